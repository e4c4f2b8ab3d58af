"""Determine the network of features and statistics in files, even if the file does not name it."""

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
    """The networks that are the 2015 Inception with some resize."""
    return [network for network in networks if network == NETWORK or network.startswith(f"{NETWORK}_")]


def settle_statistics(sources: Iterable[Opened], networks: Iterable[str]) -> None:
    """Choose the network that plain statistics without images are attributed to.

    This is ADM's if a metric uses it. Otherwise it is the only Inception network that the metrics use, unless
    the file is known to have a different resize.

    Args:
        sources: Both sides; sets :attr:`evalkit.images.source.ImageSource.statistics_network`.
        networks: Networks that the metrics use.
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
    """The sources, with other tools' features attributed to the only matching network of the metrics.

    Args:
        sources: Both sides.
        networks: Networks that the metrics use.

    Raises:
        InputError: No network, or more than one, matches; or evalkit's own features are from another network.
    """
    return [_settled(each, networks) if isinstance(each, Features) else each for each in sources]


def _settled(features: Features, networks: Collection[str]) -> Features:
    # A features file written from another tool's features may name their network.
    modes = modes_of(features) if features.network == NETWORK else {}
    known = [network for network in networks if network in (modes or {features.network})]
    if len(known) == 1:
        return replace(features, network=known[0])
    needed = " and ".join(networks)
    if not modes:
        raise InputError(
            f"{features.name} has features of {features.network}, but features of {needed} are needed. Give "
            f"the images, or choose metrics such as fd@{features.network}."
        )
    of = " or ".join(modes.values())
    count = "only one" if known else "none"
    raise InputError(
        f"{features.name} has features of {features.extractor}, from {of}. The metrics need features of "
        f"{needed}, but these come from {count} of them. Name only the protocol that they belong to, or give "
        "the images."
    )


def check_fingerprints(sources: Iterable[Opened], extractors: Mapping[str, Extractor]) -> None:
    """Raise a FeatureError if features come from a different extractor than the one in use, or each other.

    Features of another tool have no fingerprint, and get a note instead.
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
