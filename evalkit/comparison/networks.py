"""Of which network the features and statistics in files are, also where the file does not say so."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import combinations

from evalkit.comparison.sources import Opened, has_plain_statistics
from evalkit.errors import FeatureError, InputError
from evalkit.extractors import extractor_class
from evalkit.extractors.base import Extractor
from evalkit.features.adm_npz import NETWORK, written_preprocess
from evalkit.features.other_tools import modes_of
from evalkit.features.record import Features, check_same_extractor

__all__ = ["check_fingerprints", "inception_networks", "settle_features", "settle_statistics"]


def inception_networks(networks: Iterable[str]) -> list[str]:
    """Those of the networks that are the 2015 Inception behind some resize."""
    return [network for network in networks if network == NETWORK or network.startswith(f"{NETWORK}_")]


def settle_statistics(sources: Iterable[Opened], networks: Iterable[str]) -> None:
    """Settle which network plain statistics without images are taken to be of.

    It is ADM's where a metric looks at that. Otherwise it is the one Inception that the metrics look at,
    unless the file is known to be of another resize.

    Args:
        sources: Both sides; :attr:`evalkit.images.source.ImageSource.statistics_network` is set.
        networks: Those that the metrics look at.
    """
    known = inception_networks(networks)
    for source in sources:
        if isinstance(source, Features):
            continue
        source.statistics_network = NETWORK
        if len(known) == 1 and not len(source) and has_plain_statistics(source):
            resize = written_preprocess(source)
            if resize is None or resize in extractor_class(known[0]).preprocess:
                source.statistics_network = known[0]


def settle_features(sources: Iterable[Opened], networks: Collection[str]) -> list[Opened]:
    """The sources, with other tools' features as those of the one network of the metrics that they can be of.

    Args:
        sources: Both sides.
        networks: Those that the metrics look at.

    Raises:
        InputError: They can be of none of these networks, or of several; or evalkit's own are of another one.
    """
    return [_settled(each, networks) if isinstance(each, Features) else each for each in sources]


def _settled(features: Features, networks: Collection[str]) -> Features:
    # A features file that was written from another tool's may say of which network they are.
    modes = modes_of(features) if features.network == NETWORK else {}
    known = [network for network in networks if network in (modes or {features.network})]
    if len(known) == 1:
        return replace(features, network=known[0])
    needed = " and ".join(networks)
    if not modes:
        raise InputError(
            f"{features.name} holds features of {features.network}, and those of {needed} are needed. Give "
            f"the images, or choose metrics such as fd@{features.network}."
        )
    of = " or ".join(modes.values())
    why = "all of these, and they can be of only one" if known else "none of these"
    raise InputError(
        f"{features.name} holds features as {features.extractor} keeps them: {of}. Those of {needed} "
        f"are needed, {why}. Name the protocol that they are of, alone; or give the images."
    )


def check_fingerprints(sources: Iterable[Opened], extractors: Mapping[str, Extractor]) -> None:
    """Raise a FeatureError for features of another extractor than the one in use, or than one another's.

    Those of another tool have no fingerprint, and a note instead.
    """
    given = [source for source in sources if isinstance(source, Features)]
    for features in given:
        extractor = extractors.get(features.network)
        if extractor is not None and features.fingerprint not in ("", extractor.fingerprint):
            raise FeatureError(
                f"{features.name} holds features of another extractor ({features.extractor}, "
                f"{features.fingerprint[:12]}) than the one in use ({extractor.name}, "
                f"{extractor.fingerprint[:12]}): weights, preprocessing, precision or backend differ. "
                "Extract it again with `evalkit features`, or choose the settings it was made with."
            )
    for first, second in combinations(given, 2):
        if first.network == second.network:
            check_same_extractor(first, second)
