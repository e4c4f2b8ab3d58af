"""The ADM networks: diffusion UNet, noisy-image classifier, upsampler."""
