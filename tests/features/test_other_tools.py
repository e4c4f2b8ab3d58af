"""Statistics written for each tool, and read; features in other tools' files."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from optional import optional
from stand_ins import NO_STORE, STATISTICS_OF_PIXELS
from stand_ins import InceptionPixels as Pixels

from evalkit.comparability import reasons_of
from evalkit.comparison import compare, features_of, open_source
from evalkit.errors import InputError
from evalkit.extractors import EXTRACTORS, extractor_class
from evalkit.features.other_tools import read_rows, resize_warning, write_statistics
from evalkit.features.record import Features
from evalkit.images import open_images
from evalkit.images.npz import STATISTICS
from evalkit.layouts import LAYOUTS
from evalkit.report.text import table
from evalkit.results import Comparison

Invoke = Callable[..., Result]

RNG = np.random.default_rng(0)
ARRAYS = {
    key: RNG.random(shape) if len(shape) == 1 else np.eye(shape[0]) for key, shape in STATISTICS.items()
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics as wide as the features of pixels, rather than minutes with those of the network."""
    monkeypatch.setattr("evalkit.images.npz.STATISTICS", STATISTICS_OF_PIXELS)
    monkeypatch.setattr("evalkit.images.pkl.SHAPES", STATISTICS_OF_PIXELS)
    monkeypatch.setattr("evalkit.features.other_tools.SHAPES", STATISTICS_OF_PIXELS)


@pytest.mark.parametrize("tool", LAYOUTS)
def test_what_is_written_is_read_back(tool: str, tmp_path: Path) -> None:
    layout = LAYOUTS[tool]
    path = tmp_path / f"x{layout.suffix}"
    record = {"format": "evalkit statistics 1", "statistics": {"images": 7}}
    write_statistics(path, tool, ARRAYS, images=7, provenance=record)
    source = open_images(path)
    assert source.statistics is not None
    assert set(source.statistics) == set(layout.keys) & set(ARRAYS)
    for key, array in source.statistics.items():
        assert array.dtype == layout.dtypes.get(key, "float64")
        np.testing.assert_array_equal(array, ARRAYS[key].astype(array.dtype))
    assert source.provenance == record
    if "mu_s" not in source.statistics:
        assert any("no mu_s for sFID" in note for note in source.notes)
    first = path.read_bytes()
    write_statistics(path, tool, ARRAYS, images=7, provenance=record)
    assert path.read_bytes() == first


def test_for_edm2_as_its_reader_unpickles_it(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    write_statistics(path, "edm2", ARRAYS | {"mu_dinov2": np.ones(3), "sigma_dinov2": np.eye(3)}, images=9)
    data = path.read_bytes()
    assert b"numpy._core" not in data[:1000]  # which NumPy before 1.26 does not have
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pickle.loads(data)
    assert list(found) == ["num_images", "fid", "fd_dinov2"]
    assert found["num_images"] == 9
    np.testing.assert_array_equal(found["fid"]["sigma"], ARRAYS["sigma"])
    np.testing.assert_array_equal(found["fd_dinov2"]["mu"], np.ones(3))


def test_names_and_arrays_that_a_tool_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.npz: statistics for EDM2 have to be in a \.pkl"):
        write_statistics(tmp_path / "x.npz", "edm2", ARRAYS)
    with pytest.raises(InputError, match=r"for clean-fid have to be in a \.npz file"):
        write_statistics(tmp_path / "x.dat", "clean-fid", ARRAYS)
    spatial = {key: ARRAYS[key] for key in ("mu_s", "sigma_s")}
    with pytest.raises(InputError, match="only mu_s, sigma_s; statistics for EDM need mu and sigma"):
        write_statistics(tmp_path / "x.npz", "edm", spatial)
    with pytest.raises(InputError, match=r"Unknown layout 'pkl'.*adm, jit"):
        write_statistics(tmp_path / "x.npz", "pkl", ARRAYS)
    assert list(tmp_path.iterdir()) == []


def test_another_resize_is_said() -> None:
    tf1 = extractor_class("inception").preprocess
    assert tf1 == "TF1 bilinear 299x299, (x-128)/128"
    assert [tool for tool in LAYOUTS if not resize_warning(tool, "x", tf1)] == ["adm", "jit", "edm", "edm2"]
    for tool in ("pytorch-fid", "clean-fid"):
        warning = resize_warning(tool, "x", tf1)
        assert warning is not None
        assert "WRONG" in warning
        assert (LAYOUTS[tool].resize or "?") in warning
        assert tf1 in warning
    assert "legacy_tensorflow" in (resize_warning("clean-fid", "x", tf1) or "")
    assert "x does not say how" in (resize_warning("jit", "x", None) or "")
    assert resize_warning("adm", "x", None) is None


@pytest.mark.parametrize(
    ("network", "tools"),
    [
        ("inception", ["jit", "edm", "edm2"]),
        ("inception_pytorch_fid", ["pytorch-fid"]),
        ("inception_clean_fid", ["clean-fid"]),
    ],
)
def test_the_words_of_a_resize_are_those_of_the_network(network: str, tools: list[str]) -> None:
    """Statistics of each network are right for the tools with its resize, and for no others."""
    preprocess = extractor_class(network).preprocess
    known = [tool for tool, layout in LAYOUTS.items() if layout.resize and not layout.own]
    fitting = [tool for tool in known if resize_warning(tool, "x", preprocess) is None]
    assert fitting == tools


# Each reader, as far as it can be had ------------------------------------------------------------------


@pytest.mark.usefixtures("torchvision_stand_in", "pixels", "small")
def test_torch_fidelity_reads_what_is_written_for_it(
    run: Invoke, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    """Its arithmetic on our file gives our FID; with other types it stops at its assertion."""
    module = optional("torch_fidelity.metric_fid", "crosscheck")
    torch = optional("torch", "crosscheck")
    np.savez(tmp_path / "ref.npz", images[:30])
    assert run("stats", tmp_path / "ref.npz", "-o", tmp_path / "jit.npz", "--as", "jit").code == 0
    theirs = module.fid_features_to_statistics(torch.from_numpy(Pixels()(images[30:])["pool"]))
    with np.load(tmp_path / "jit.npz", allow_pickle=False) as file:
        ours = {key: file[key] for key in ("mu", "sigma")}
    found = module.fid_statistics_to_metric(theirs, ours, verbose=False)["frechet_inception_distance"]
    comparison = compare(
        tmp_path / "jit.npz", images[30:], protocol="exact", metrics="fid", extractor=Pixels(), run=NO_STORE
    )
    assert found == pytest.approx(comparison["fid"], rel=1e-5)
    assert found > 0.01
    with pytest.raises(AssertionError):
        module.fid_statistics_to_metric(theirs, ours | {"mu": ours["mu"].astype(np.float64)}, verbose=False)


# The command line --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pixels", "small")
@pytest.mark.parametrize("tool", LAYOUTS)
def test_every_tool_gives_the_same_fid(
    tool: str, run: Invoke, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    np.savez(tmp_path / "ref.npz", images[:30])
    np.savez(tmp_path / "samples.npz", images[30:])
    out = tmp_path / f"x{LAYOUTS[tool].suffix}"
    result = run("stats", tmp_path / "ref.npz", "-o", out, "--as", tool)
    assert result.code == 0
    assert result.out.startswith(f"{out}: statistics of 30 images of ")
    assert ("warning: " in result.err) == (tool != "adm")  # pixels are resized as no tool does
    record = (open_images(out).provenance or {})["statistics"]
    assert (record["images"], record["preprocess"]) == (30, Pixels.preprocess)
    arguments = ("--protocol", "exact", "--metrics", "fid,sfid,precision", "--json", tmp_path / "x.json")
    scores = {}
    for reference in (tmp_path / "ref.npz", out):
        assert run("compare", reference, tmp_path / "samples.npz", *arguments).code == 0
        scores[reference] = Comparison.from_json((tmp_path / "x.json").read_text())
    expected, found = scores.values()
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-6)
    assert found.reference.statistics_images == 30
    assert "is statistics alone; this needs the images" in found.missing["precision"]
    if tool == "adm":
        assert found["sfid"] == pytest.approx(expected["sfid"], rel=1e-6)
    else:
        assert "is statistics alone" in found.missing["sfid"]
        assert any("no mu_s for sFID" in warning for warning in found.warnings)


def test_convert(run: Invoke, tmp_path: Path) -> None:
    source, out = tmp_path / "adm.npz", tmp_path / "x.pkl"
    write_statistics(source, "adm", ARRAYS)
    result = run("reference", "convert", source, out, "--as", "edm2")
    assert result.code == 0
    assert result.out.startswith(f"{out}: statistics of {source}, for EDM2\n")
    assert "Left out, as files for EDM2 have no place for it: mu_s" in result.out
    assert f"{source} does not say how its images were resized" in result.out
    back = tmp_path / "back.npz"
    assert run("reference", "convert", out, back, "--as", "jit").code == 0
    with np.load(back, allow_pickle=False) as file:
        assert (sorted(file), file["mu"].dtype, file["sigma"].dtype) == (["mu", "sigma"], "f4", "f8")
        np.testing.assert_array_equal(file["mu"], ARRAYS["mu"].astype(np.float32))
    shown = run("reference", "show", out).out
    assert "no images" in shown or "no labels" in shown


def test_convert_knows_the_resize_and_leaves_images_out(
    run: Invoke, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    record = {"statistics": {"images": 5, "preprocess": "TF1 bilinear 299x299, (x-128)/128"}}
    source = tmp_path / "ref.npz"
    np.savez(source, arr_0=images, provenance=np.array(json.dumps(record)), **ARRAYS)  # type: ignore[arg-type]
    result = run("reference", "convert", source, tmp_path / "a.npz", "--as", "edm")
    assert "note: The images of" in result.out
    assert "Another resize" not in result.out
    assert "were resized" not in result.out
    result = run("reference", "convert", source, tmp_path / "b.npz", "--as", "clean-fid")
    assert "note: Another resize: these statistics are of images resized with TF1 bilinear" in result.out
    assert open_images(tmp_path / "b.npz").provenance == record


@pytest.mark.parametrize("preprocess", [7, ["TF1 bilinear"], {}, None])
def test_a_resize_that_is_no_text_is_none(run: Invoke, tmp_path: Path, preprocess: Any) -> None:
    record = {"statistics": {"images": 5, "preprocess": preprocess}}
    write_statistics(tmp_path / "x.npz", "adm", ARRAYS, provenance=record)
    result = run("reference", "convert", tmp_path / "x.npz", tmp_path / "y.npz", "--as", "jit")
    assert result.code == 0
    assert "x.npz does not say how its images were resized" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "{images}", "{out}.npz", "--as", "jit"), "holds no mean and covariance"),
        (("convert", "{statistics}", "{out}.npz"), "To write the statistics for another tool, give --as"),
        (("convert", "{statistics}", "{out}.npz", "--as", "edm2"), "have to be in a .pkl file"),
        (("convert", "{statistics}", "{statistics}", "--as", "jit"), "Cannot write"),
        (("convert", "{statistics}", "{out}.npz", "--as", "torch"), "'torch' is not one of"),
    ],
)
def test_what_convert_refuses(
    run: Invoke, tmp_path: Path, images: NDArray[np.uint8], arguments: tuple[str, ...], words: str
) -> None:
    paths = {"images": tmp_path / "i.npz", "statistics": tmp_path / "s.npz", "out": tmp_path / "out"}
    np.savez(paths["images"], images)
    write_statistics(paths["statistics"], "adm", ARRAYS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("reference", *(argument.format(**paths) for argument in arguments))
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("pixels")
def test_stats_refuses_a_name_before_the_work(
    run: Invoke, tmp_path: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("features are extracted")

    monkeypatch.setattr(Pixels, "__call__", never)
    np.savez(tmp_path / "i.npz", images)
    result = run("stats", tmp_path / "i.npz", "-o", tmp_path / "x.npz", "--as", "edm2")
    assert (result.code, result.out) == (2, "")
    assert "have to be in a .pkl file" in result.err


# What can be compared ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_the_kind_of_file_makes_no_other_reference(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """An ADM npz, one with only mu and sigma, and a features file match; rounded statistics do not."""
    rows = Pixels()(images[:30])
    arrays = {
        f"{key}{suffix}": value
        for suffix, output in (("", "pool"), ("_s", "spatial"))
        for key, value in (
            ("mu", rows[output].mean(0)),
            ("sigma", np.cov(rows[output], rowvar=False)),
        )
    }
    np.savez(tmp_path / "adm.npz", arr_0=images[:30], **arrays)
    write_statistics(tmp_path / "edm.npz", "edm", arrays)
    features_of(tmp_path / "adm.npz", extractor=Pixels(), run=NO_STORE).save(tmp_path / "adm.h5")
    np.savez(tmp_path / "rounded.npz", **arrays | {"sigma": arrays["sigma"].astype(np.float32)})

    def measured(name: str) -> Comparison:
        return compare(
            tmp_path / name, images[30:], metrics="fid,precision", extractor=Pixels(), run=NO_STORE
        )

    adm, pair, features, rounded = map(measured, ("adm.npz", "edm.npz", "adm.h5", "rounded.npz"))
    assert [each["fid"] for each in (pair, features)] == [pytest.approx(adm["fid"], rel=1e-6)] * 2
    assert len({each.reference.statistics_digest for each in (adm, pair, features)}) == 3
    assert reasons_of([adm, pair, features]) == ()
    (reason,) = reasons_of([adm, rounded])
    assert reason.text.startswith("different reference: the statistics of ")
    assert reason.scores == ("fid",)


@pytest.mark.usefixtures("small")
def test_samples_with_statistics_of_other_images_are_marked(
    tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    rows = Pixels()(images[:30])["pool"]
    np.savez(tmp_path / "s.npz", arr_0=images[30:], mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    plain, beside = (
        compare(images[:30], samples, metrics="fid,precision", extractor=Pixels(), run=NO_STORE)
        for samples in (images[30:], tmp_path / "s.npz")
    )
    assert beside["fid"] < 0.01 < plain["fid"]
    marks = {reason.text.partition(":")[0]: reason.scores for reason in reasons_of([plain, beside])}
    assert marks == {"different samples": ("fid",), "number of samples not recorded": ("fid",)}
    assert Comparison.from_json(beside.to_json()) == beside


# Other keys, networks and features ---------------------------------------------------------------------


def test_fd_loss_and_meanflow(tmp_path: Path) -> None:
    more = {"avg_mu": np.zeros(2048), "avg_sigma": np.eye(2048)}
    np.savez(tmp_path / "fd.npz", mu=ARRAYS["mu"], sigma=ARRAYS["sigma"], **more)
    source = open_images(tmp_path / "fd.npz")
    assert (source.statistics or {}).keys() == {"mu", "sigma"}
    assert any("not used: avg_mu, avg_sigma" in note for note in source.notes)
    np.savez(tmp_path / "mf.npz", ref_mu=ARRAYS["mu"], ref_sigma=ARRAYS["sigma"])
    source = open_images(tmp_path / "mf.npz")
    np.testing.assert_array_equal((source.statistics or {})["sigma"], ARRAYS["sigma"])
    assert any("has only ref_mu and ref_sigma: FID uses these" in note for note in source.notes)
    np.savez(tmp_path / "half.npz", ref_mu=ARRAYS["mu"], sigma_ref=ARRAYS["sigma"])
    with pytest.raises(InputError, match="has ref_mu without sigma"):
        open_images(tmp_path / "half.npz")
    np.savez(tmp_path / "vit.npz", mu=np.zeros(1152), sigma=np.eye(1152))
    with pytest.raises(InputError, match="Statistics 1152 wide are of another network"):
        open_images(tmp_path / "vit.npz")


def test_dinov2_of_edm2_is_for_that_network(
    tmp_path: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network with the name and the output of DINOv2 takes them; Inception does not."""
    monkeypatch.setattr("evalkit.images.pkl.SHAPES", {"mu_dinov2": (48,), "sigma_dinov2": (48, 48)})

    assert extractor_class("dinov2_vitl14").outputs.keys() == {"class_token"}

    class Dino(Pixels):
        network = "dinov2_vitl14"
        outputs = {"class_token": 48}  # noqa: RUF012 - a stand-in
        derived = {}  # noqa: RUF012

        def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            return {"class_token": super().__call__(images)["pool"]}

    monkeypatch.setitem(EXTRACTORS, "dinov2_vitl14", "x:Dino")
    monkeypatch.setattr("evalkit.metrics.extractor_class", lambda network: Dino)
    rows = Dino()(images[:30])["class_token"]
    content = {"fd_dinov2": {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    found, expected = (
        compare(reference, images[30:], metrics="fd@dinov2_vitl14", extractor=Dino(), run=NO_STORE)
        for reference in (tmp_path / "x.pkl", images[:30])
    )
    assert found["fd@dinov2_vitl14"] == pytest.approx(expected["fd@dinov2_vitl14"], rel=1e-5)
    none = compare(tmp_path / "x.pkl", images[30:], metrics="fid", extractor=Pixels(), run=NO_STORE)
    assert "is statistics alone" in none.missing["fid"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("key", ["feats", "pool_3"])
def test_features_of_another_tool(key: str, tmp_path: Path, images: NDArray[np.uint8]) -> None:
    rows = Pixels()(images[:30])["pool"]
    path = tmp_path / "cifar10_clean_train_32_kid.npz"
    np.savez_compressed(path, **{key: rows})
    side = open_source(path)
    assert isinstance(side, Features)
    assert (len(side), side.fingerprint) == (30, "")
    options: dict[str, Any] = {"metrics": "kid,fid,sfid,precision", "extractor": Pixels(), "run": NO_STORE}
    found = compare(path, images[30:], **options)
    expected = compare(images[:30], images[30:], **options)
    for name in ("kid", "fid", "precision"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)
    assert "holds no spatial features, only pool" in found.missing["sfid"]
    assert any("comparable only with features of the same resize" in warning for warning in found.warnings)
    assert found.extractors["inception"]["fingerprint"] == Pixels().fingerprint
    assert compare(images[30:], path, **options)["kid"] == pytest.approx(expected["kid"], rel=1e-9)
    kept = tmp_path / "kept.h5"
    side.save(kept)
    again = compare(kept, images[30:], **options)
    assert again["kid"] == found["kid"]
    assert any("kept.h5 has features of" in warning for warning in again.warnings)
    both = compare(path, path, metrics="fid", run=NO_STORE)
    assert both["fid"] == pytest.approx(0, abs=1e-6)


def behind(network: str) -> Pixels:
    """Pixels in place of an Inception network with some resize."""

    class Behind(Pixels):
        pass

    Behind.network = network
    return Behind()


@pytest.mark.usefixtures("small")
def test_features_of_clean_fid_are_of_the_mode_whose_protocol_is_named(
    tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    """Each mode resizes differently, and the file does not name its mode."""
    path = tmp_path / "x_kid.npz"
    np.savez(path, feats=Pixels()(images[:30])["pool"])

    def measured(reference: Any, protocol: str, *networks: str) -> Comparison:
        extractors = [behind(network) for network in networks]
        return compare(
            reference, images[30:], protocol=protocol, metrics="kid", extractor=extractors, run=NO_STORE
        )

    for protocol, network, mode in (
        ("clean-fid", "inception_clean_fid", "clean (protocol clean-fid)"),
        ("clean-fid-legacy-pytorch", "inception_clean_fid_legacy_pytorch", "legacy_pytorch (protocol"),
        ("adm", "inception", "legacy_tensorflow (protocol adm)"),
    ):
        found = measured(path, protocol, network)
        expected = measured(images[:30], protocol, network)
        assert found["kid"] == pytest.approx(expected["kid"], rel=1e-9)
        (warning,) = [text for text in found.warnings if "does not say which mode" in text]
        assert f"does not say which mode its features come from; {mode}" in warning
        assert "every score with them is WRONG: name that protocol" in warning
        # The record says where they came from, and that they are not comparable with anything.
        assert (found.reference.extracted_by, expected.reference.extracted_by) == ("clean-fid's KID", "")
        assert "features of clean-fid's KID from the file" in table(found)
        assert {reason.text for reason in reasons_of([found, found])} == {"network not recorded"}
    with pytest.raises(
        InputError, match=r"of inception_pytorch_fid, but these come from none of them\. Name only"
    ):
        compare(path, images, protocol="pytorch-fid", run=NO_STORE)
    with pytest.raises(
        InputError, match="of inception and inception_clean_fid, but these come from only one of them"
    ):
        compare(path, images, protocol="adm,clean-fid", run=NO_STORE)
    np.savez(path, pool_3=Pixels()(images[:30])["pool"])
    with pytest.raises(InputError, match="from TensorFlow's Inception"):
        compare(path, images, protocol="clean-fid", run=NO_STORE)
    assert not any("which mode" in text for text in measured(path, "adm", "inception").warnings)


@pytest.mark.usefixtures("small", "pixels")
def test_statistics_of_the_features_of_another_tool(
    run: Invoke, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    rows = Pixels()(images)["pool"]
    np.savez(tmp_path / "kid.npz", feats=rows)
    result = run("stats", tmp_path / "kid.npz", "-o", tmp_path / "x.npz", "--as", "clean-fid")
    assert result.code == 0
    assert "does not say how its images were resized" in result.err
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert sorted(file) == ["mu", "sigma"]  # and nothing is said of how they were made
        np.testing.assert_allclose(file["mu"], rows.mean(0, dtype=np.float64), rtol=1e-12)


@pytest.mark.usefixtures("small")
def test_features_of_another_network_are_refused_where_features_are_kept(
    run: Invoke, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    np.savez(tmp_path / "kid.npz", feats=Pixels()(images)["pool"])
    result = run("features", tmp_path / "kid.npz", "-o", tmp_path / "x.h5", "--network", "pixels")
    assert (result.code, result.out) == (2, "")
    assert "kid.npz has features of clean-fid's KID, from clean (protocol clean-fid) or" in result.err
    assert not (tmp_path / "x.h5").exists()
    kept = features_of(tmp_path / "kid.npz", extractor=behind("inception_clean_fid"), run=NO_STORE)
    assert (kept.network, len(kept)) == ("inception_clean_fid", 60)
    kept.save(tmp_path / "kept.h5")
    with pytest.raises(
        InputError, match=r"kept\.h5 has features of inception_clean_fid, but features of incep"
    ):
        compare(tmp_path / "kept.h5", images, metrics="kid", extractor=Pixels(), run=NO_STORE)
    again = {"protocol": "clean-fid", "extractor": behind("inception_clean_fid"), "run": NO_STORE}
    assert compare(tmp_path / "kept.h5", images, metrics="kid", **again).reference.images == 60


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.zeros((5, 1024), np.float32), "feats is float32 of shape (5, 1024); expected floats"),
        (np.zeros((5, 2048), np.int64), "feats is int64"),
        (np.zeros(2048, np.float32), "of shape (2048,)"),
        (np.full((2, 2048), np.inf, np.float32), "NaN or infinity"),
        (np.array([{}]), "pickled Python objects"),
    ],
)
def test_features_that_are_none(rows: NDArray[Any], words: str, tmp_path: Path, run: Invoke) -> None:
    np.savez(tmp_path / "x.npz", feats=rows)
    result = run("compare", tmp_path / "x.npz", tmp_path / "x.npz")
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_more_rows_than_there_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalkit.features.other_tools._MOST_ROWS", 4)
    np.savez(tmp_path / "x.npz", feats=np.zeros((5, 2048), np.float32))
    with pytest.raises(InputError, match=r"of shape \(5, 2048\); expected .* at most 4 rows"):
        read_rows(tmp_path / "x.npz")


def test_other_files_are_no_features(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    np.savez(tmp_path / "images.npz", arr_0=images, feats=np.zeros((60, 2048)))
    np.savez(tmp_path / "none.npz", a=np.zeros(3))
    (tmp_path / "text").write_text("feats")
    for path in (tmp_path, *tmp_path.iterdir(), tmp_path / "absent"):
        assert read_rows(path) is None
