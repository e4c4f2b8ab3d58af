"""Scores in the model card of a repository on the Hugging Face hub."""

from __future__ import annotations

from evalkit.errors import MissingDependencyError
from evalkit.results import Comparison

__all__ = ["model_index"]


def model_index(
    comparison: Comparison,
    *,
    model: str,
    dataset: str,
    dataset_name: str,
    task: str = "unconditional-image-generation",
) -> str:
    """The ``model-index`` of a model card: YAML to be put between the lines ``---`` at its head.

    Every score is a metric whose arguments say how it was made: protocol, number of images, digests of the
    reference, standard error.

    Args:
        comparison: As computed, or ``Comparison.from_json`` of what ``--json`` wrote.
        model: Name of the model.
        dataset: Its id on the hub, such as ``ILSVRC/imagenet-1k``.
        dataset_name: What readers call it, such as ``ImageNet 256x256``.
        task: The hub's name of the task.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError as error:
        raise MissingDependencyError(
            f"Model cards are written with huggingface_hub, which cannot be imported ({error}): "
            "pip install 'evalkit[hub]'"
        ) from None
    titles = {spec.name: spec.title for spec in comparison.specs}
    of_all = {
        "protocol": comparison.protocol,
        "images": comparison.samples.images,
        "reference": comparison.reference.digest,
        "reference_statistics": comparison.reference.statistics_digest,
        "evalkit": comparison.versions.get("evalkit"),
    }
    results = []
    for score in comparison.scores:
        arguments = of_all | {"stderr": score.stderr, "unbiased": score.unbiased}
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=dataset_name,
                metric_type=score.name,
                metric_name=titles[score.name],
                metric_value=score.value,
                metric_args={key: value for key, value in arguments.items() if value not in (None, "")},
            )
        )
    return f"{ModelCardData(model_name=model, eval_results=results).to_yaml().strip()}\n"
