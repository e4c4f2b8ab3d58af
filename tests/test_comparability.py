"""The rules of what can be compared, one by one, on made-up comparisons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evalkit.batches import Batch, LabelBalance
from evalkit.comparability import reasons_of
from evalkit.results import Comparison, Score, ScoreSpec

SPECS = tuple(
    ScoreSpec(name=name, title=name.upper(), higher_is_better=False)
    for name in ("fid", "inception_score", "precision", "kid", "fd@dinov2")
)
BALANCED = LabelBalance(kind="balanced", classes=1000, least=50, most=50)
RANDOM = LabelBalance(kind="random", classes=1000, least=31, most=74)
REFERENCE = Batch(
    name="cache/VIRTUAL.npz",
    images=10_000,
    image_shape=(256, 256, 3),
    digest="a" * 64,
    statistics="file",
    features="extracted",
    statistics_digest="b" * 64,
    statistics_preprocess="not said",
    source="published imagenet256",
    labels=RANDOM,
)
SAMPLES = replace(
    REFERENCE,
    name="s.npz",
    source="s.npz",
    images=50_000,
    digest="c" * 64,
    statistics="images",
    statistics_digest=None,
    statistics_preprocess=None,
    labels=BALANCED,
)
INCEPTION = {
    "name": "inception-2015-12-05",
    "fingerprint": "1" * 64,
    "backend": "torch",
    "precision": "float32",
    "device": "cpu",
    "preprocess": "TF1 bilinear 299x299",
    "weights": {"digest": "d" * 64},
}
DINO = {
    "name": "dinov2",
    "fingerprint": "2" * 64,
    "preprocess": "torch bicubic 224x224",
    "weights": {"digest": "e" * 64},
}
SCORES = (
    Score(name="fid", value=2.0, outputs=("inception:pool",), reference="statistics", parameters={"k": 1}),
    Score(name="inception_score", value=200.0, outputs=("inception:logits",), reference="nothing"),
    Score(name="precision", value=0.8, outputs=("inception:pool",), reference="images", parameters={"k": 3}),
    Score(name="kid", value=0.001, unbiased=0.001, outputs=("inception:pool",), reference="images"),
    Score(name="fd@dinov2", value=80.0, outputs=("dinov2:class_token",), reference="images"),
)
OURS = Comparison(
    specs=SPECS,
    scores=SCORES,
    missing={},
    protocol="adm",
    reference=REFERENCE,
    samples=SAMPLES,
    extractors={"inception": INCEPTION, "dinov2": DINO},
    byte_rules={"adm": "8-bit RGB."},
)
ALL = ("fid", "inception_score", "precision", "kid", "fd@dinov2")


def test_a_subset_is_of_both_sides() -> None:
    """10,000 of 50,000 against 10,000 of 50,000 is not 10,000 against 50,000."""
    reference = replace(REFERENCE, images=50_000, statistics="images", statistics_digest=None)
    drawn = [replace(score, parameters={"subset": 10_000}, reference="images") for score in SCORES]
    a = replace(OURS, reference=reference, scores=tuple(drawn))
    few = replace(SAMPLES, images=10_000)
    b = replace(
        OURS, reference=reference, samples=few, scores=tuple(replace(s, parameters={}) for s in drawn)
    )
    (reason,) = reasons_of([a, b])
    assert reason.text.startswith("different reference: the images of published imagenet256")
    assert "instead of 10,000 of the images" in reason.text
    assert reasons_of([a, a]) == ()


def with_scores(**changes: dict[str, Any]) -> Comparison:
    """Ours with other fields of some scores."""
    scores = tuple(replace(score, **changes.get(score.name, {})) for score in SCORES)
    return replace(OURS, scores=scores)


def said(*comparisons: Comparison) -> dict[str, tuple[str, ...]]:
    return {reason.text: reason.scores for reason in reasons_of(comparisons)}


def test_the_same_is_like_for_like() -> None:
    assert said(OURS) == {}
    assert said(OURS, OURS) == {}
    others = replace(
        OURS,
        samples=replace(SAMPLES, name="t.npz", source="t.npz", digest="f" * 64),
        reference=replace(REFERENCE, name="elsewhere.npz", source="elsewhere.npz"),
        extractors={"inception": INCEPTION | {"device": "cuda:0"}, "dinov2": DINO},
        seconds={"fid": 1.0},
        warnings=("one",),
    )
    assert said(OURS, others) == {}


def extractor(**changes: Any) -> dict[str, Any]:
    return {"inception": INCEPTION | {"fingerprint": "9" * 64} | changes, "dinov2": DINO}


@pytest.mark.parametrize(
    ("theirs", "text", "scores"),
    [
        (
            replace(OURS, protocol="exact", byte_rules={"exact": "x"}),
            "different protocol: exact instead of adm",
            ALL,
        ),
        (
            replace(OURS, samples=replace(SAMPLES, images=10_000)),
            "different number of samples: 10,000 instead of 50,000",
            ("fid", "inception_score", "precision", "fd@dinov2"),  # and not KID, which has no bias
        ),
        (
            replace(OURS, samples=replace(SAMPLES, labels=RANDOM)),
            "different label balance of the samples: random, 1,000 classes of 31 to 74 images instead of "
            "balanced, 1,000 classes of 50 images",
            ALL,
        ),
        (
            replace(OURS, samples=replace(SAMPLES, labels=replace(BALANCED, classes=500))),
            "different label balance of the samples: balanced, 500 classes of 50 images instead of "
            "balanced, 1,000 classes of 50 images",
            ALL,
        ),
        (
            replace(OURS, samples=replace(SAMPLES, labels=LabelBalance(kind="none"))),
            "different label balance of the samples: no labels instead of "
            "balanced, 1,000 classes of 50 images",
            ALL,
        ),
        (
            replace(
                OURS, reference=replace(REFERENCE, statistics_digest="9" * 64, source="published jit-in256")
            ),
            "different reference: the statistics of published jit-in256 (digest 999999999999) instead of the "
            "statistics of published imagenet256 (digest bbbbbbbbbbbb)",
            ("fid",),
        ),
        (
            replace(OURS, reference=replace(REFERENCE, digest="9" * 64, images=9_000)),
            "different reference: the images of published imagenet256 (9,000 images, digest 999999999999) "
            "instead of the images of published imagenet256 (10,000 images, digest aaaaaaaaaaaa)",
            ("precision", "kid", "fd@dinov2"),
        ),
        (
            with_scores(fid={"reference": "images"}),
            "different reference: the images of published imagenet256 (10,000 images, digest aaaaaaaaaaaa) "
            "instead of the statistics of published imagenet256 (digest bbbbbbbbbbbb)",
            ("fid",),
        ),
        (
            replace(OURS, extractors=extractor(preprocess="bicubic")),
            "different network: resize bicubic instead of TF1 bilinear 299x299",
            ("fid", "inception_score", "precision", "kid"),
        ),
        (
            replace(OURS, extractors=extractor(precision="bfloat16", weights={"digest": "9" * 64})),
            "different network: weights 999999999999 instead of dddddddddddd; "
            "precision bfloat16 instead of float32",
            ("fid", "inception_score", "precision", "kid"),
        ),
        (
            replace(OURS, extractors={"inception": INCEPTION, "dinov2": DINO | {"fingerprint": "9" * 64}}),
            "different network: dinov2 (fingerprint 999999999999) instead of "
            "dinov2 (fingerprint 222222222222)",
            ("fd@dinov2",),
        ),
        (
            with_scores(precision={"parameters": {"k": 5}}),
            "different parameters: k 5 instead of 3",
            ("precision",),
        ),
        (
            with_scores(precision={"parameters": {"k": 3, "subset": 10_000, "seed": 1}}),
            "different number of samples: 10,000 instead of 50,000",
            ("precision",),
        ),
        (
            replace(OURS, byte_rules={"adm": "Floats."}),
            "different byte rule: Floats instead of 8-bit RGB",
            ALL,
        ),
    ],
)
def test_one_difference(theirs: Comparison, text: str, scores: tuple[str, ...]) -> None:
    assert said(OURS, theirs) == {text: scores}
    assert [reason.comparisons for reason in reasons_of([OURS, theirs])] == [(1,)]


@pytest.mark.parametrize(
    ("theirs", "text", "scores"),
    [
        (replace(OURS, byte_rules={}), "byte rule not recorded", ALL),
        (
            replace(OURS, samples=replace(SAMPLES, labels=None)),
            "label balance of the samples not recorded",
            ALL,
        ),
        (with_scores(fid={"reference": None}), "reference not recorded", ("fid",)),
        (
            replace(OURS, samples=replace(SAMPLES, images=0, statistics="file")),
            "number of samples not recorded",
            ("fid", "inception_score", "precision", "fd@dinov2"),
        ),
        (
            replace(OURS, extractors={"inception": INCEPTION | {"fingerprint": ""}, "dinov2": DINO}),
            "network not recorded",
            ("fid", "inception_score", "precision", "kid"),
        ),
    ],
)
def test_what_is_not_recorded_is_never_the_same(
    theirs: Comparison, text: str, scores: tuple[str, ...]
) -> None:
    """Wherever it stands, and also if nobody has recorded it."""
    assert said(OURS, theirs) == said(theirs, OURS) == said(theirs, theirs) == {text: scores}
    assert [reasons_of(pair)[0].comparisons for pair in ([theirs, OURS], [theirs, theirs])] == [(0,), (0, 1)]


def test_what_earlier_records_say_is_used() -> None:
    """Those of a reference without statistics, and of one network, say enough."""
    plain = replace(REFERENCE, statistics="images", statistics_digest=None)
    new = replace(OURS, reference=plain, extractors={"inception": INCEPTION}, scores=SCORES[2:4])
    old = replace(new, scores=tuple(replace(score, outputs=(), reference=None) for score in new.scores))
    assert said(new, old) == {}
    other = replace(old, reference=replace(plain, digest="9" * 64))
    assert list(said(new, other).values()) == [("precision", "kid")]
    named = with_scores(fid={"outputs": (), "parameters": {"k": 1, "output": "inception:pool"}})
    assert "network not recorded" not in said(OURS, named)
    assert said(OURS, with_scores(fid={"outputs": ()})) == {"network not recorded": ("fid",)}


def test_protocols_of_one_pass() -> None:
    """A score of the second protocol is that protocol's, and the rule of the first is the first's alone."""
    scores = (SCORES[0], replace(SCORES[0], name="fid@clean-fid"))
    both = replace(
        OURS,
        specs=(SPECS[0], replace(SPECS[0], name="fid@clean-fid")),
        scores=scores,
        protocol="adm,clean-fid",
        byte_rules={"adm": "8-bit RGB.", "clean-fid": "Pillow."},
    )
    assert said(OURS, both) == {}
    swapped = replace(both, protocol="exact,clean-fid", byte_rules={"exact": "x", "clean-fid": "Pillow."})
    assert said(both, swapped) == {"different protocol: exact instead of adm": ("fid",)}


def test_of_several_equal_marks_mean_like_for_like() -> None:
    """Also among those that differ from the first, and where the first has not recorded it."""
    images = [50_000, 10_000, 10_000, 5_000, 0]
    several = [replace(OURS, samples=replace(SAMPLES, images=count)) for count in images]
    found = {reason.text: reason.comparisons for reason in reasons_of(several)}
    assert found == {
        "different number of samples: 10,000 instead of 50,000": (1, 2),
        "different number of samples: 5,000 instead of 50,000": (3,),
        "number of samples not recorded": (4,),
    }
    assert {reason.text: reason.comparisons for reason in reasons_of(several[::-1])} == {
        "number of samples not recorded": (0,),
        "different number of samples: 10,000 instead of 5,000": (2, 3),
        "different number of samples: 50,000 instead of 5,000": (4,),
    }


def test_two_that_differ_in_more_than_is_said_have_two_reasons() -> None:
    """Two extractors of the same precision, which is another than the first one's, need not be the same."""
    several = [
        OURS,
        *(
            replace(OURS, extractors=extractor(fingerprint=digit * 64, precision="bfloat16"))
            for digit in "89"
        ),
    ]
    found = {reason.text: reason.comparisons for reason in reasons_of(several)}
    assert found == {
        "different network: precision bfloat16 instead of float32": (1,),
        "different network: inception-2015-12-05 (fingerprint 999999999999) instead of inception-2015-12-05 "
        "(fingerprint 111111111111)": (2,),
    }


def test_another_protocol_has_its_own_parameters() -> None:
    """They are not said to differ from another protocol's, but from those of the same one."""
    exact = replace(OURS, protocol="exact", byte_rules={"exact": "x"})
    other = replace(exact, scores=with_scores(precision={"parameters": {"k": 5}}).scores)
    found = {reason.text: reason.cells for reason in reasons_of([OURS, exact, other])}
    assert found["different parameters: k 5 instead of 3"] == ((2, "precision"),)
    assert len(found) == 2


def test_a_score_that_one_has_is_beside_nothing() -> None:
    other = replace(OURS, protocol="exact", scores=SCORES[:1], byte_rules={})
    assert set(said(OURS, other).values()) == {("fid",)}


# Statistics in files ------------------------------------------------------------------------------------

POOL, SPATIAL = "inception:pool", "inception:spatial"


def with_digests(source: str, file: str, **outputs: str) -> Comparison:
    """Our comparison against another file, whose output digests each repeat one letter."""
    names = {"pool": POOL, "spatial": SPATIAL}
    digests = {names[output]: letter * 64 for output, letter in outputs.items()}
    reference = replace(REFERENCE, source=source, statistics_digest=file * 64, output_digests=digests)
    return replace(OURS, reference=reference)


def test_statistics_of_one_content_are_the_same_reference() -> None:
    """Independent of the file type and of other contents."""
    npz = with_digests("ref.npz", "1", pool="a", spatial="b")
    features, pair = with_digests("ref.h5", "2", pool="a", spatial="b"), with_digests("x.npz", "3", pool="a")
    assert said(npz, features, pair) == {}
    other = with_digests("other.npz", "1", pool="c", spatial="b")  # the digest of the file does not matter
    assert said(npz, other) == {
        "different reference: the statistics of other.npz (digest cccccccccccc) instead of the statistics of "
        "ref.npz (digest aaaaaaaaaaaa)": ("fid",)
    }
    sfid = replace(SCORES[0], name="sfid", outputs=(SPATIAL,))
    specs = (*SPECS, replace(SPECS[0], name="sfid"))
    npz, other = (replace(each, specs=specs, scores=(*SCORES, sfid)) for each in (npz, other))
    assert [*said(npz, other).values()] == [("fid",)]  # but not sFID, whose statistics are the same


def test_earlier_records_have_one_digest_of_all_statistics() -> None:
    old, new = with_digests("ref.npz", "1"), with_digests("ref.npz", "1", pool="a")
    assert said(old, new) == said(new, old) == said(old, old) == {}
    (reason,) = said(old, with_digests("ref.h5", "2", pool="a"))
    assert reason.startswith("different reference: the statistics of ref.h5 (digest 222222222222)")
    none = replace(old, reference=replace(old.reference, statistics_digest=None))
    assert said(none, new) == {"reference not recorded": ("fid",)}
    # A record against images has no statistics, and does not change the result.
    images = replace(REFERENCE, statistics="images", statistics_digest=None, statistics_preprocess=None)
    plain = replace(OURS, reference=images, scores=SCORES[1:])
    assert said(plain, new, with_digests("ref.h5", "2", pool="a")) == {}


def test_a_score_of_images_and_statistics_needs_both_to_be_the_same() -> None:
    """FDr6 of a file with Inception's statistics computes those of other networks from its images."""
    spec = replace(SPECS[0], name="fdr6")
    score = replace(SCORES[0], name="fdr6", outputs=(POOL, "dinov2:class_token"))
    ours = replace(with_digests("ref.npz", "1", pool="a"), specs=(spec,), scores=(score,))
    other = replace(ours, reference=replace(ours.reference, digest="9" * 64))
    (reason,) = said(ours, other)
    assert reason == (
        "different reference: the statistics of ref.npz (digest aaaaaaaaaaaa) and its images (digest "
        "999999999999) instead of the statistics of ref.npz (digest aaaaaaaaaaaa) and its images (digest "
        "aaaaaaaaaaaa)"
    )
    assert said(ours, ours) == {}
    old = [replace(each, reference=replace(each.reference, output_digests={})) for each in (ours, other)]
    assert len(said(*old)) == 1


def test_statistics_beside_the_samples_are_marked() -> None:
    """FID then does not use the images in the file, but the other scores do."""
    beside = replace(SAMPLES, statistics="file", statistics_images=50_000, statistics_digest="5" * 64)
    new = replace(with_scores(fid={"samples": "statistics"}), samples=beside)
    new = replace(new, scores=(new.scores[0], *(replace(each, samples="images") for each in new.scores[1:])))
    text = (
        "different samples: the mean and covariance in their file, which may not be of its images, instead "
        "of the images"
    )
    assert said(OURS, new) == {text: ("fid",)}
    few = replace(new, samples=replace(beside, statistics_images=1_281_167))
    number = "different number of samples: 1,281,167 instead of 50,000"
    assert said(OURS, few) == {text: ("fid",), number: ("fid",)}
    unknown = replace(new, samples=replace(beside, statistics_images=None))
    assert said(OURS, unknown) == {text: ("fid",), "number of samples not recorded": ("fid",)}
    # For a file with only statistics, the number of images stated in it counts.
    alone = replace(few, samples=replace(few.samples, images=0))
    alone = replace(alone, scores=alone.scores[:1])
    assert said(replace(OURS, scores=SCORES[:1]), alone) == {number: ("fid",)}
    # Earlier records do not say which scores used which.
    old = replace(OURS, samples=beside)
    assert said(old, old) == {"samples not recorded": ALL}


def test_features_of_another_tool_are_of_a_network_that_is_not_recorded() -> None:
    """Even though the other side, whose images were extracted, has a fingerprint."""
    samples = replace(OURS, samples=replace(SAMPLES, features="file", extracted_by="clean-fid's KID"))
    assert said(OURS, samples) == said(samples, samples) == {"network not recorded": ALL}
    reference = replace(OURS, reference=replace(REFERENCE, features="file", extracted_by="clean-fid's KID"))
    seen = tuple(name for name in ALL if name != "inception_score")
    assert said(OURS, reference) == {"network not recorded": seen}
