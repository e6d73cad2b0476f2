"""Videos: read frame by frame, cut into clips and patches, and followed through finished runs."""

from dataclasses import asdict
from fractions import Fraction
import json
import sys

from commands import refused
import jax
import numpy as np
from PIL import Image
import pytest
import xarray as xr

from sami_ppl.data import check_data, cut_clips, cut_patches, load_data, luminance
from sami_ppl.data.readers.images import Decoding
from sami_ppl.data.readers.video import read_video
from sami_ppl.saving import files as programs
from sami_ppl.saving import save as io

KEY = jax.random.key(0)
WITHOUT = "needs PyAV: pip install 'sami_ppl[video]'"


def write(path, frames, rate=5, codec="ffv1"):
    """A video of frames (frame, row, column, 3), without loss."""
    av = pytest.importorskip("av", reason=WITHOUT)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def moving(count=12, rows=16, columns=24):
    """A bright square that moves by a pixel a frame on an even ground."""
    frames = np.full((count, rows, columns, 3), (60, 80, 100), np.uint8)
    for i, frame in enumerate(frames):
        frame[4:9, i : i + 5] = (250, 200, 20)
    return frames


def test_frames_are_those_that_were_written(tmp_path):
    frames = moving()
    data = load_data(write(tmp_path / "clip.MKV", frames))
    np.testing.assert_allclose(data.x, frames.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert data.split.values.tolist() == 10 * ["train"] + 2 * ["test"]
    assert data.attrs["frames_per_second"] == 5
    check_data(data)


def test_gray_frames_have_one_channel_and_frames_are_resized(tmp_path):
    frames = np.repeat(moving()[..., :1], 3, axis=-1)
    data = read_video(write(tmp_path / "clip.mkv", frames), Decoding(resize=8))
    assert data.x.shape == (12, 1, 8, 8)
    assert data.x.dtype == np.uint8
    expected = Image.fromarray(frames[3, ..., 0]).resize((8, 8), Image.Resampling.BICUBIC, box=(4, 0, 20, 16))
    np.testing.assert_allclose(data.x[3, 0].astype(float), np.asarray(expected, float), atol=1)


@pytest.mark.parametrize("content", [b"", b"not a video" * 50])
def test_what_cannot_be_decoded_is_named(tmp_path, content):
    pytest.importorskip("av", reason=WITHOUT)
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"clip\.mp4 cannot be decoded as a video.*ffmpeg -i clip\.mp4"):
        load_data(tmp_path / "clip.mp4")


def test_the_decoder_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'sami_ppl\[video\]'"):
        load_data(tmp_path / "clip.mp4")


def test_clips_are_consecutive_stretches():
    x = np.arange(20)[:, None]
    np.testing.assert_array_equal(cut_clips(x, 3, step=2)[..., 0], [[0, 2, 4], [5, 7, 9], [10, 12, 14], [15, 17, 19]])
    with pytest.raises(ValueError, match="there are 20 frames, but a clip of 11 frames, 2 apart, takes 21"):
        cut_clips(x, 11, step=2)
    with pytest.raises(ValueError, match="length=0"):
        cut_clips(x, 0)


def test_patches_are_cut_out_of_the_video():
    """Each value names its frame, row and column, by which all of them are known."""
    frame, row, column = np.meshgrid(np.arange(9), np.arange(7), np.arange(10), indexing="ij")
    x = (100 * frame + 10 * row + column)[:, None]
    found = cut_patches(x, (3, 4), 400, length=4, step=2, key=KEY)
    assert found.shape == (400, 4, 1, 3, 4)
    assert (np.diff(found, axis=1) == 200).all()
    assert (np.diff(found, axis=3) == 10).all()
    assert (np.diff(found, axis=4) == 1).all()
    corners = found[:, 0, 0, 0, 0]
    for place, count in ((corners // 100, 3), (corners // 10 % 10, 5), (corners % 10, 7)):
        assert set(place) == set(range(count)), "every time and place occurs"
    assert cut_patches(x, (3, 4), 5, key=KEY).shape == (5, 1, 1, 3, 4)
    with pytest.raises(ValueError, match="patches of 8×4"):
        cut_patches(x, (8, 4), 5, key=KEY)


def test_patches_are_where_something_moves():
    """Noise of 1 on the left, a square that moves on the right: the second alone is taken."""
    x = np.random.default_rng(0).normal(size=(6, 1, 4, 40))
    x[..., 20:] += 50 * np.arange(6)[:, None, None, None]
    found = cut_patches(x, (4, 4), 30, length=3, change=20, key=KEY)
    assert found.shape == (30, 3, 1, 4, 4)
    assert (np.ptp(found[..., -1], axis=1) > 50).all()
    assert (cut_patches(x, (4, 4), 30, length=3, key=KEY)[..., -1].max((1, 2, 3)) < 20).any(), "control: all"
    with pytest.raises(ValueError, match="change=1000: none of 1,500 patches"):
        cut_patches(x, (4, 4), 30, length=3, change=1000, key=KEY)


def test_luminance_is_that_of_pillow():
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4), dtype=np.uint8)
    expected = [np.asarray(Image.fromarray(one.transpose(1, 2, 0)).convert("L")) for one in x]
    np.testing.assert_allclose(luminance(x)[:, 0], np.array(expected, float), atol=1)
    np.testing.assert_array_equal(luminance(x[:, :1]), x[:, :1])
    with pytest.raises(ValueError, match="got 2"):
        luminance(x[:, :2])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two runs of gray images of 8×8 pixels, and of one with a larger code, their networks at random."""
    from conftest import fill

    folder = tmp_path_factory.mktemp("runs")
    stills = np.random.default_rng(0).uniform(-1, 1, (60, 1, 8, 8)).astype(np.float32)
    np.savez(folder / "stills.npz", x=stills)
    file = programs.find("images", "models")
    for name, latents in (("a", 3), ("b", 3), ("large", 4)):
        config = programs.load_file(file).Config(latents=latents, size=8, network="mlp")
        data = load_data(folder / "stills.npz")
        program = programs.build_program(file, config, data, key=jax.random.key(len(name)))
        io.save(program.replace(encoder=fill(program.encoder)), folder / name / "model")
        description = {"seed": 0, "data": str(folder / "stills.npz"), "settings": {"model": asdict(config)}}
        (folder / name / "config.json").write_text(json.dumps(description))
        for other in ("posterior.nc", "metrics.json"):
            (folder / name / other).touch()
    return folder


@pytest.mark.slow
def test_the_command_follows_videos_through_runs(runs, sami, tmp_path):
    """Patches of two videos, one smooth and one of noise, in codes of two runs."""
    noise = np.random.default_rng(1).integers(0, 256, (12, 16, 24, 3), dtype=np.uint8)
    smooth = (np.linspace(0, 200, 12)[:, None, None, None] * np.ones((1, 16, 24, 3))).astype(np.uint8)
    videos = [write(tmp_path / "smooth.mkv", smooth), write(tmp_path / "noise.mkv", noise)]
    options = ("--patches", 6, "--frames", 5, "--resamples", 50, "--out", "found")
    code, out, err = sami("straightness", runs / "a", runs / "b", "--video", *videos, *options)
    assert code == 0, err
    found = xr.load_dataset(tmp_path / "found" / "straightness.nc", engine="h5netcdf")
    assert found.curvature.dims == ("trajectory", "clip")
    assert found.trajectory.values.tolist()[:2] == [str(runs / "a"), str(runs / "b")]
    pixels = found.curvature.sel(trajectory="pixels").groupby("video").mean()
    assert float(pixels.sel(video=str(videos[0]))) < 1, "a patch that grows brighter evenly goes straight"
    assert float(pixels.sel(video=str(videos[1]))) == pytest.approx(120, abs=5), "independent points"
    table = json.loads((tmp_path / "found" / "straightness.json").read_text())
    row = table[str(runs / "b")]
    assert row["curvature_low"] <= row["curvature"] <= row["curvature_high"]
    assert f"{row['curvature']:.1f} ({row['curvature_low']:.1f} to" in out
    assert "12 clips of 2 videos, 5 frames" in out
    assert (tmp_path / "found" / "straightness.png").is_file()


@pytest.mark.slow
def test_what_the_command_refuses(runs, sami, tmp_path):
    video = write(tmp_path / "clip.mkv", moving())
    (tmp_path / "bad.mp4").write_bytes(b"nothing")

    def refuse(*arguments, folders=("a",)):
        return refused(sami("straightness", *(runs / name for name in folders), *arguments))

    assert "of 16 × 24 pixels, the program takes 8 × 8: cut patches, --patches 50" in refuse("--video", video)
    assert "takes 14: give a longer video" in refuse("--video", video, "--patches", 3, "--frames", 14)
    short = write(tmp_path / "short.mkv", moving(2))
    assert "short.mkv: there are 2 frames, but a clip of 3" in refuse("--video", short, "--patches", 3, "--frames", 3)
    assert "--frames 2: must be at least 3" in refuse("--video", video, "--frames", 2)
    assert "bad.mp4 cannot be decoded as a video" in refuse("--video", tmp_path / "bad.mp4")
    assert "there is no video" in refuse("--video", "nowhere.mp4")
    assert "--change 255: none of" in refuse("--video", video, "--patches", 3, "--frames", 3, "--change", 255)
    assert "codes of one size" in refuse("--video", video, "--patches", 3, folders=("a", "large"))
    assert "is named twice" in refuse("--video", video, folders=("a", "a"))
    assert "is no finished run" in refused(sami("straightness", tmp_path, "--video", video))
