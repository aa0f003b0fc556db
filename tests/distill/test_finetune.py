"""``sam-export finetune`` on a handful of photographs: it learns, stops, goes on to the same bits, writes float16."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the export extra")
coco_mask = pytest.importorskip("pycocotools.mask", reason="needs the dev extra")

from edgesam_deploy.cli import main
from edgesam_deploy.distill.finetune import Views
from edgesam_deploy.distill.half import half_precision
from edgesam_deploy.distill.labelled import Labelled, label_map
from edgesam_deploy.distill.options import FinetuneOptions
from edgesam_deploy.distill.truth_objective import TruthObjective, decode, embed_prompts, losses
from edgesam_deploy.distill.views import Settings, coverage
from edgesam_deploy.distill.windows import cut_masks
from edgesam_deploy.errors import CheckpointError
from edgesam_deploy.masks import tight_box
from edgesam_deploy.measure.datasets import DatasetOptions, open_dataset
from edgesam_deploy.measure.truths import Target
from edgesam_deploy.models import build_model
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import load_recipe

PHOTOS = sorted((Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos" / "verify").glob("*.jpg"))
# Tests that run in the background inherit an ignored Ctrl-C, which a run of theirs would ignore too.
HEED_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
SHORT = ("--batch", 2, "--prompts", 4, "--held", 2, "--warmup", 2, "--threads", 1, "--log-every", 1)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three layouts of small photographs whose regions are their grey levels."""
    root = tmp_path_factory.mktemp("labelled")
    for folder in ("labels", "masks", "images"):
        (root / folder).mkdir()
    annotations, images = [], []
    for index, path in enumerate(PHOTOS):
        image = Image.open(path).convert("RGB").resize((96, 72))
        levels = (np.asarray(image.convert("L")) // 64).astype(np.uint8)
        if index < 4:
            image.save(root / "labels" / f"{index}.jpg")
            Image.fromarray(levels + 1).save(root / "labels" / f"{index}.seg0.png")
            Image.fromarray((levels > 1).astype(np.uint8)).save(root / "labels" / f"{index}.seg1.png")
        elif index < 6:
            image.save(root / "masks" / f"{index}.jpg")
            Image.fromarray((levels > 1).astype(np.uint8) * 255).save(root / "masks" / f"{index}.png")
        else:
            image.save(root / "images" / f"{index}.jpg")
            images.append({"id": index, "file_name": f"{index}.jpg", "height": 72, "width": 96})
            encoded = coco_mask.encode(np.asfortranarray((levels > 1).astype(np.uint8)))
            segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
            box = coco_mask.toBbox(encoded).tolist()
            annotations.append(
                {
                    "id": index,
                    "image_id": index,
                    "area": int((levels > 1).sum()),
                    "iscrowd": 0,
                    "category_id": 1,
                    "bbox": box,
                    "segmentation": segmentation,
                }
            )
    text = json.dumps({"images": images, "annotations": annotations})
    (root / "instances.json").write_text(text, encoding="utf-8")
    return [f"labels:{root / 'labels'}", f"masks:{root / 'masks'}", f"coco:{root / 'instances.json'}@{root / 'images'}"]


@pytest.fixture
def words(tiny_recipe: Path, checkpoint: Path, datasets: list[str]) -> list[str]:
    given = [part for text in datasets for part in ("--dataset", text)]
    return [str(tiny_recipe), "--init", str(checkpoint), *given, *map(str, SHORT)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["finetune", *map(str, arguments)], prog_name="sam-export")


def answer(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def open_all(datasets: list[str]) -> Labelled:
    opened = []
    for text in datasets:
        where, _, images = text.partition("@")
        opened.append(open_dataset(where, DatasetOptions(min_share=0, images=Path(images) if images else None)))
    return Labelled(opened)


def mean_loss(recipe: Path, weights: Path, datasets: list[str]) -> float:
    """Over whole images with prompts that no run has drawn."""
    options, labelled = FinetuneOptions(shapes=0, prompts=8, seed=99), open_all(datasets)
    model = load_model(load_recipe(recipe), weights).eval()
    objective = TruthObjective(model, load_recipe(recipe), options)
    settings = Settings(128, 32, 8, (123, 116, 103), flat=0, paste=0, fit=1, box=0.65)
    views = Views(labelled, np.arange(len(labelled)), options, settings)
    with torch.inference_mode():
        found = [objective(*(t[None] for t in views[0, i, i]))[0].item() for i in range(len(labelled))]
    return float(np.mean(found))


def test_it_learns_and_writes_what_can_be_loaded(
    words: list[str], tmp_path: Path, tiny_recipe: Path, checkpoint: Path, datasets: list[str]
) -> None:
    before = mean_loss(tiny_recipe, checkpoint, datasets)
    plain = ("--shapes", 0, "--flat", 0, "--paste", 0, "--fit", 1)
    found = answer(*words, *plain, "--epochs", 4, "--lr", 1e-4, "--half", "--check-every", 10, "-o", tmp_path)
    log, checks = rows(tmp_path / "log.csv"), rows(tmp_path / "checks.csv")
    assert found["finished"] is True
    assert found["total"] == len(log)
    assert mean_loss(tiny_recipe, tmp_path / "student.pt", datasets) < 0.95 * before
    assert float(checks[-1]["box_iou"]) == pytest.approx(found["held_out"]["box_iou"], abs=1e-6)
    state = torch.load(tmp_path / "student.pt", weights_only=True)
    assert all(v.dtype == torch.float16 and torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    assert all(v.min() >= 0.05 for k, v in state.items() if k.endswith("lab.scale"))
    load_model(load_recipe(tiny_recipe), tmp_path / "student.pt")
    with Image.open(tmp_path / "samples" / f"step-{found['total']:06d}.png") as picture:
        assert picture.size == (4 * 256, 2 * 2 * 256)


@pytest.mark.parametrize(("learn", "still"), [("decoder", "image_encoder"), ("encoder", "mask_decoder")])
def test_only_what_is_asked_for_learns(
    words: list[str], tmp_path: Path, checkpoint: Path, learn: str, still: str
) -> None:
    answer(*words, "--epochs", 1, "--learn", learn, "-o", tmp_path)
    after, before = (torch.load(p, weights_only=True) for p in (tmp_path / "student.pt", checkpoint))
    same = {k: torch.equal(v, before[k].to(v.dtype)) for k, v in after.items()}
    assert all(equal for k, equal in same.items() if k.startswith(still))
    assert not all(same.values())


def test_positions_are_encoded_along_x_and_y(words: list[str], tmp_path: Path, tiny_recipe: Path) -> None:
    answer(*words, "--epochs", 1, "--learn", "decoder", "--shapes", 1, "--axes", 4, "-o", tmp_path)
    layer = load_model(load_recipe(tiny_recipe), tmp_path / "student.pt").prompt_encoder.pe_layer
    number = layer.positional_encoding_gaussian_matrix.shape[1] // 2
    along_x, along_y = (layer._pe_encoding(torch.tensor([xy])).reshape(2, 2, -1) for xy in ([0.7, 0.5], [0.5, 0.2]))
    frequencies = np.geomspace(0.12, 4, number)
    for found, place, axis in ((along_x, 0.7, 0), (along_y, 0.2, 1)):
        angles = 2 * np.pi * frequencies * (2 * place - 1)
        np.testing.assert_allclose(found[0, axis], np.sin(angles), atol=1e-5)
        np.testing.assert_allclose(found[1, axis], np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(found[0, 1 - axis], 0, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_with_the_same_bits(words: list[str], tmp_path: Path, number: signal.Signals) -> None:
    """Killed, it goes on from the last state that it saved; asked to stop, as its loader is too, from where it was."""
    long = [*words, "--epochs", "3"]
    whole = answer(*long, "-o", tmp_path / "whole")
    again = [*long, "-o", str(tmp_path / "again")]
    again += ["--save-every", "0"] if number == signal.SIGKILL else ["--workers", "1"]
    command = [sys.executable, "-c", HEED_CTRL_C, "-m", "edgesam_deploy", "finetune", *again]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        log, deadline = tmp_path / "again" / "log.csv", time.monotonic() + 120
        while not (log.exists() and len(rows(log)) >= 3):
            assert process.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, number)  # as a terminal and a job's end do
        errors = process.communicate()[1]
    assert (tmp_path / "again" / "state.pt").is_file(), errors
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "run the same command to go on" in errors
        assert "Traceback" not in errors
    done = answer(*again)
    assert done["sha256"] == whole["sha256"]
    assert [int(r["step"]) for r in rows(log)] == list(range(1, whole["total"] + 1))


def test_two_processes_learn_what_one_learns(words: list[str], tmp_path: Path) -> None:
    same = [*words, "--optimizer", "sgd", "--freeze-norm", "--lr", "0.01", "--epochs", "2", "--shapes", "0"]
    answer(*same, "--batch", 2, "-o", tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "edgesam_deploy", "finetune", *same, "--batch", "1", "-o", str(tmp_path / "two"), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = ([float(r["loss"]) for r in rows(tmp_path / name / "log.csv")] for name in ("one", "two"))
    assert len(one) > 3
    assert two == pytest.approx(one, abs=1e-4)


def test_views_show_what_their_prompts_say(datasets: list[str]) -> None:
    """Boxes are tight around their targets or a little off, clicks are on them, and one photograph is on one side."""
    labelled = open_all([*datasets, datasets[0]])
    learnt, held = labelled.split(3)
    names = [{labelled.load(int(i)).name for i in part} for part in (learnt, held)]
    assert len(held) >= 3
    assert not names[0] & names[1]
    assert len(labelled.load(0).layers) == 2, "two people drew"
    wanted = FinetuneOptions(shapes=0, prompts=6, seed=3)
    settings = Settings(64, 64, 6, (123, 116, 103), flat=0.5, paste=0.5, fit=0.5, box=0.5)
    views = Views(labelled, learnt, wanted, settings)
    seen = set()
    for micro in range(12):
        image, coords, labels, masks, targets, windows, shapes = views[0, int(learnt[micro % len(learnt)]), micro]
        assert image.shape == (3, 64, 64)
        assert not shapes
        assert windows.tolist() == [[16, 0, 0]] * 6, "the whole embedding"
        assert torch.equal(masks.float(), targets), "the low-resolution mask is as large as the view"
        for points, kinds, mask in zip(coords.numpy(), labels.numpy(), masks.numpy(), strict=True):
            assert mask.any()
            for (x, y), kind in zip(points, kinds, strict=True):
                seen.add(int(kind))
                if kind in (0, 1):
                    assert mask[int(y), int(x)] == (kind == 1)
            if 2 in kinds:
                corners = points[np.isin(kinds, (2, 3))].ravel()
                assert np.abs(corners - tight_box(mask)).max() <= 0.04 * 64 + 1
    assert seen == {-1, 0, 1, 2, 3}


def test_the_fast_decoder_answers_as_segment_anything_does(tiny_recipe: Path, checkpoint: Path) -> None:
    recipe = load_recipe(tiny_recipe)
    sam = load_model(recipe, checkpoint).eval()
    size, side = recipe.geometry.image_size, recipe.geometry.embedding_size
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(1, recipe.geometry.embedding_channels, side, side, generator=generator)
    points = torch.rand(3, 2, 2, generator=generator) * size
    kinds = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    with torch.inference_mode():
        sparse, dense = sam.prompt_encoder(points=(points, kinds), boxes=None, masks=None)
        wanted = sam.mask_decoder.predict_masks(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)
        padded = torch.cat([points, torch.zeros(3, 1, 2)], 1), torch.cat([kinds, -torch.ones(3, 1)], 1)
        found = decode(sam, embedding, embed_prompts(sam, *padded))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_mixed_precision_keeps_places_exact(tiny_recipe: Path, checkpoint: Path) -> None:
    """Eight bits of a coordinate are two pixels of 512: neighbours would be one place."""
    model = load_model(load_recipe(tiny_recipe), checkpoint)
    model.prompt_encoder.input_image_size = (512, 512)
    coords = torch.tensor([[[float(x), 300.0], [400.0, float(x)]] for x in range(240, 272)])
    labels = torch.tensor([[2.0, 3.0]]).expand(len(coords), 2)
    with torch.inference_mode():
        expected = embed_prompts(model, coords, labels)
        with torch.autocast("cpu", torch.bfloat16):
            found = embed_prompts(model, coords, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_small_masks_are_asked_for_more_often(datasets: list[str]) -> None:
    """By boxes, inversely to their area with the power 1: the mean area asked for is then the harmonic mean of the
    areas. Clicks ask for all equally often."""
    labelled, areas = open_all(datasets), {}
    for box, power in ((1, 0.0), (1, 1.0), (0, 1.0)):
        settings = Settings(96, 96, 600, (123, 116, 103), flat=0, paste=0, fit=1, box=box, small=power)
        views = Views(labelled, np.arange(len(labelled)), FinetuneOptions(shapes=0, seed=3), settings)
        areas[box, power] = [views[0, image, 0][3].float().sum((1, 2)).numpy() for image in range(3)]
    for equally, inversely, clicked in zip(areas[1, 0.0], areas[1, 1.0], areas[0, 1.0], strict=True):
        assert clicked.mean() == pytest.approx(np.unique(equally).mean(), rel=0.02)
        assert len(set(equally.tolist())) > 1
        assert set(inversely.tolist()) <= set(equally.tolist()), "the same view"
        assert inversely.mean() == pytest.approx(1 / (1 / np.unique(equally)).mean(), rel=0.1)


def test_a_small_mask_keeps_its_area_when_a_caller_enlarges_it() -> None:
    """As PyTorch enlarges low-resolution masks; the plain mean of a mask of 3 x 5 pixels would leave nothing."""
    rng, lost, kept = np.random.default_rng(0), [], []
    ys, xs = np.mgrid[:128, :128] + 0.5
    for _ in range(60):
        high, wide = rng.uniform(3, 20, 2)
        y, x = rng.uniform(20, 108, 2)
        mask = (2 * (ys - y) / high) ** 2 + (2 * (xs - x) / wide) ** 2 <= 1
        for low, found in ((mask.reshape(32, 4, 32, 4).mean((1, 3)), lost), (coverage(mask, 32), kept)):
            assert low.shape == (32, 32)
            assert 0 <= low.min() <= low.max() <= 1
            large = torch.nn.functional.interpolate(
                torch.tensor(low)[None, None].float(), scale_factor=4, mode="bilinear"
            )
            again = large[0, 0].numpy() > 0.5
            found.append([again.sum() / mask.sum(), (again & mask).sum() / (again | mask).sum()])
    assert np.mean(lost, axis=0)[0] < 0.85, "this is what it is for"
    assert np.mean(kept, axis=0)[0] == pytest.approx(1, abs=0.05)
    assert np.mean(kept, axis=0)[1] > np.mean(lost, axis=0)[1] + 0.05
    assert np.min(kept, axis=0)[0] > 0.5


def test_a_small_mask_is_learnt_as_a_caller_enlarges_it() -> None:
    """From free logits of low resolution. Compared at the size of the view, masks of 4 to 8 pixels are found again;
    compared at low resolution, their places between the low-resolution pixels are lost."""
    rng, fine, coarse = np.random.default_rng(0), [], []
    ys, xs = np.mgrid[:64, :64] + 0.5
    for _ in range(8):
        (high, wide), (y, x) = rng.uniform(4, 8, 2), rng.uniform(16, 48, 2)
        mask = torch.from_numpy((2 * (ys - y) / high) ** 2 + (2 * (xs - x) / wide) ** 2 <= 1)
        for target, found in ((mask.float(), fine), (torch.from_numpy(coverage(mask.numpy(), 16)), coarse)):
            logits = torch.zeros(1, 4, 16, 16, requires_grad=True)
            optimizer = torch.optim.Adam([logits], 0.3)
            for _ in range(100):
                optimizer.zero_grad()
                losses(logits, torch.zeros(1, 4), target[None], torch.tensor([[2.0, 3.0]])).total.backward()
                optimizer.step()
            large = torch.nn.functional.interpolate(logits.detach(), scale_factor=4, mode="bilinear")[0, 0] > 0
            found.append(float((large & mask).sum() / (large | mask).sum()))
    assert np.mean(fine) > 0.9
    assert np.mean(coarse) < np.mean(fine) - 0.1


def test_as_many_boxes_fit_as_asked_for(datasets: list[str]) -> None:
    labelled, fitting = open_all(datasets), {}
    for exact in (0.0, 0.7, 1.0):
        settings = Settings(256, 64, 200, (123, 116, 103), flat=0, paste=0, fit=1, box=1, exact=exact)
        views = Views(labelled, np.arange(len(labelled)), FinetuneOptions(shapes=0, seed=3), settings)
        _, coords, _, masks, *_ = views[0, 0, next(m for m in range(9) if views[0, 0, m][1].shape[1] == 2)]
        same = [np.array_equal(c.ravel(), tight_box(m)) for c, m in zip(coords.numpy(), masks.numpy(), strict=True)]
        fitting[exact] = np.mean(same)
    assert fitting[0.0] < 0.02
    assert fitting[0.7] == pytest.approx(0.7, abs=0.12)
    assert fitting[1.0] == 1


def test_windows_hold_what_is_asked_for(datasets: list[str]) -> None:
    """A prompt's points and its whole mask; of five sizes, which do not tell the object's. One click: all there is."""
    labelled = open_all(datasets)
    everything = np.arange(len(labelled))
    settings = Settings(512, 128, 8, (123, 116, 103), flat=0, paste=0, fit=0.5, box=0.5)
    views = Views(labelled, everything, FinetuneOptions(shapes=0.5, windows=1, seed=5), settings)

    def small(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> bool:
        x0, y0, x1, y1 = tight_box(mask)
        return max(x1 - x0, y1 - y0) <= 16

    sides, loose, clicks = set(), 0, 0
    for micro in range(24):
        _, coords, labels, _, targets, windows, _ = views[0, micro % len(labelled), micro]
        for points, kinds, target, (side, row, column) in zip(coords, labels, targets, windows.tolist(), strict=True):
            assert 0 <= row <= 32 - side
            assert 0 <= column <= 32 - side
            part = np.s_[4 * row : 4 * (row + side), 4 * column : 4 * (column + side)]
            assert target.sum() > 0
            assert torch.count_nonzero(target[part]) == torch.count_nonzero(target)
            inside = points[kinds >= 0].numpy() / 16 - (column, row)
            assert (inside >= 0).all()
            assert (inside <= side).all()
            if kinds[kinds >= 0].tolist() == [1]:
                assert (side, row, column) == (32, 0, 0), "a window would tell the size that a click leaves open"
                clicks += 1
                continue
            sides.add(side)
            loose += bool(side > 8 and small((target > 0).numpy()))
    assert sides == {8, 12, 16, 24, 32}
    assert loose > 0
    assert clicks > 0


def test_a_window_is_decoded_as_segment_anything_decodes_that_part(tiny_recipe: Path, checkpoint: Path) -> None:
    recipe = load_recipe(tiny_recipe)
    sam = load_model(recipe, checkpoint).eval()
    channels, size = recipe.geometry.embedding_channels, recipe.geometry.image_size
    side, part = recipe.geometry.embedding_size, recipe.geometry.embedding_size // 2
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, channels, side, side, generator=generator, requires_grad=True)
    points, kinds = torch.rand(3, 2, 2, generator=generator) * size, torch.tensor([[2.0, 3.0]] * 3)
    image, places = torch.tensor([1, 0, 1]), [(part, 0, 1), (part, 3, 2), (part, side - part, side - part)]
    sparse = embed_prompts(sam, points, kinds)
    masks, scores = decode(sam, embeddings, sparse, image, torch.tensor(places))
    assert masks.shape == (3, 4, 4 * part, 4 * part)
    target = torch.rand(3, 4 * side, 4 * side, generator=generator)
    cut = cut_masks(target, torch.tensor(places), side)
    for i, (_, row, column) in enumerate(places):
        window = np.s_[..., row : row + part, column : column + part]
        dense = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, part, part)
        wanted = sam.mask_decoder.predict_masks(
            embeddings[image[i]][None][window], sam.prompt_encoder.get_dense_pe()[window], sparse[i][None], dense
        )
        torch.testing.assert_close(masks[i][None], wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[i][None], wanted[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(cut[i], target[i, 4 * row : 4 * (row + part), 4 * column : 4 * (column + part)])
    gradient = torch.autograd.grad(masks[1].sum(), embeddings)[0]
    seen = torch.zeros(2, side, side, dtype=torch.bool)
    seen[0, 3 : 3 + part, 2 : 2 + part] = True
    assert torch.equal(gradient.abs().sum(1) > 0, seen)


def test_it_learns_in_windows(words: list[str], tmp_path: Path, checkpoint: Path) -> None:
    answer(*words, "--windows", 1, "--image-size", 256, "--epochs", 1, "-o", tmp_path)
    after, before = (torch.load(p, weights_only=True) for p in (tmp_path / "student.pt", checkpoint))
    for part in ("image_encoder", "prompt_encoder", "mask_decoder"):
        assert not all(torch.equal(v, before[k].to(v.dtype)) for k, v in after.items() if k.startswith(part))


def test_clicks_alone_are_learnt_on_views_of_half_the_size(datasets: list[str]) -> None:
    """Of the whole embedding, and as often as asked for; everything else is as large as ever."""
    labelled, half = open_all(datasets), []
    settings = Settings(512, 128, 4, (123, 116, 103), flat=0, paste=0, fit=1, box=1)
    options = FinetuneOptions(shapes=0.25, windows=1, half_clicks=0.5, seed=6)
    views = Views(labelled, np.arange(len(labelled)), options, settings)
    for micro in range(40):
        image, coords, labels, _, targets, windows, shapes = views[0, micro % len(labelled), micro]
        small = image.shape[-1] == 256
        half.append(small)
        assert image.shape == ((3, 256, 256) if small else (3, 512, 512))
        assert targets.shape[1:] == ((64, 64) if small else (128, 128))
        assert not (small and shapes)
        if small and coords.shape[1] == 2:
            assert labels.tolist() == [[1, -1]] * 4
            for (x, y), target in zip(coords[:, 0].tolist(), targets, strict=True):
                assert target[int(y) // 4, int(x) // 4] > 0, "a click lies on its mask"
        if small:
            assert windows.tolist() == [[16, 0, 0]] * 4
    assert 0.2 < np.mean(half) < 0.6


def test_the_network_takes_views_of_half_the_size(words: list[str], tmp_path: Path, checkpoint: Path) -> None:
    first = answer(*words, "--half-clicks", 1, "--image-size", 128, "--epochs", 1, "-o", tmp_path / "half")
    whole = answer(*words, "--image-size", 128, "--epochs", 1, "-o", tmp_path / "whole")
    assert first["held_out"]["images"] == whole["held_out"]["images"], "judged at the full size"
    assert first["sha256"] != whole["sha256"]


def test_a_variance_that_float16_cannot_hold_is_rescaled_without_changing_the_network() -> None:
    model = build_model(load_recipe("reference"))
    model.image_encoder.fuse[1].running_var.fill_(1e6)
    weights = half_precision(model)
    assert weights["image_encoder.fuse.1.running_var"].max() < 65504
    again = build_model(load_recipe("reference"))
    again.load_state_dict(weights)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = model.image_encoder(image), again.image_encoder(image)
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-3)
    model.mask_decoder.iou_token.weight.data.fill_(1e6)
    with pytest.raises(CheckpointError, match=r"do not fit float16: 1 tensors .* mask_decoder\.iou_token\.weight"):
        half_precision(model)


def test_a_checkpoint_with_infinity_is_refused(tmp_path: Path) -> None:
    """What such a rescaling prevents: a network that loads, runs, and ignores the image."""
    recipe = load_recipe("reference")
    state = build_model(recipe).state_dict()
    state["image_encoder.fuse.1.running_var"] = torch.full((256,), 1e6).half()
    torch.save(state, tmp_path / "inf.pt")
    with pytest.raises(CheckpointError, match=r"inf or NaN, the first is image_encoder\.fuse\.1\.running_var"):
        load_model(recipe, tmp_path / "inf.pt")


WRONG: dict[str, tuple[list[object], int, str]] = {
    "dataset": (["--dataset", "coco:/nowhere.json"], 2, "/nowhere.json, which does not exist"),
    "layout": (["--dataset", "voc:/tmp"], 2, "LAYOUT:PATH with a layout of coco"),
    "size": (["--image-size", 40], 2, "image_size must be a multiple of 32, got 40"),
    "half-size": (["--half-clicks", 0.5, "--image-size", 96], 2, "image_size must be a multiple of 64, got 96"),
    "init": (["--init", "/nowhere.pt"], 1, "/nowhere.pt"),
    "lr": (["--lr", 1e12, "--ema", 0, "--warmup", 0], 1, "start again with a lower --lr"),
}


@pytest.mark.parametrize(("more", "code", "says"), WRONG.values(), ids=WRONG)
def test_wrong_requests_end_in_one_line(
    words: list[str], tmp_path: Path, more: list[object], code: int, says: str
) -> None:
    result = run(*words, "-o", tmp_path, *more)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_finished_run_is_written_again_in_the_other_type(words: list[str], tmp_path: Path) -> None:
    found = answer(*words, "--epochs", 1, "-o", tmp_path)
    halved = answer(*words, "--epochs", 1, "--half", "-o", tmp_path)
    assert halved["sha256"] != found["sha256"]
    state = torch.load(tmp_path / "student.pt", weights_only=True)
    assert all(v.dtype == torch.float16 for v in state.values() if v.is_floating_point())


def test_a_validation_leaves_nothing_in_the_network(datasets: list[str], tmp_path: Path) -> None:
    """MobileSAM's attention keeps its biases when it is asked in eval mode."""
    text = (Path(__file__).resolve().parents[2] / "export" / "mobile_sam.toml").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith(("image_size", "prompt_size", "embedding_size")):
            text = text.replace(line, f"{line.partition('=')[0]}= {8 if line.startswith('embedding') else 128}")
    (tmp_path / "mobile.toml").write_text(text, encoding="utf-8")
    words = [tmp_path / "mobile.toml", "--dataset", datasets[0], *SHORT, "--check-every", 1, "--epochs", 2]
    assert answer(*words, "-o", tmp_path / "run")["total"] == 2


@pytest.mark.parametrize(("option", "value", "size"), [("--image-size", 64, 64), ("--half-clicks", 0.5, 512)])
def test_an_encoder_of_one_size_is_named(
    datasets: list[str], tmp_path: Path, option: str, value: float, size: int
) -> None:
    result = run("sam_vit_b", "--dataset", datasets[0], option, value, "-o", tmp_path, *SHORT)
    assert result.exit_code == 2, result.output
    assert f"takes no images of {size} pixels, only of its own 1024: leave out {option}" in result.stderr
    assert not (tmp_path / "run.json").exists()


def test_frames_of_a_sequence_are_on_one_side(tmp_path: Path) -> None:
    for number, path in enumerate(PHOTOS[:6]):
        image = Image.open(path).convert("L").resize((32, 24))
        image.save(tmp_path / f"{'abc'[number % 3]}_{number}.jpg")
        image.point(lambda v: 255 * (v > 99)).save(tmp_path / f"{'abc'[number % 3]}_{number}.png")
    labelled = Labelled([open_dataset(f"davis:{tmp_path}")])
    sides = [{labelled.load(int(i)).name[0] for i in part} for part in labelled.split(1)]
    assert sides[0] | sides[1] == set("abc")
    assert not sides[0] & sides[1]


def test_where_masks_overlap_the_smaller_is_in_front() -> None:
    whole, part = np.zeros((2, 8, 8), bool)
    whole[1:7, 1:7], part[2:4, 2:4] = True, True
    targets = [Target(name, mask, np.zeros(4), 1.0) for name, mask in (("part", part), ("whole", whole))]
    labels = label_map(targets, (8, 8))
    assert (labels[part] == 2).all()
    assert (labels[whole & ~part] == 1).all()
    specks = [Target(str(i), np.arange(64).reshape(8, 8) == i % 64, np.zeros(4), 1.0) for i in range(300)]
    assert (label_map([*specks, *targets], (8, 8)) > 0)[whole].all(), "the largest are kept"


def test_a_decoder_that_is_not_sams_is_refused(datasets: list[str], tmp_path: Path) -> None:
    result = run("efficient_sam_ti", "--dataset", datasets[0], "-o", tmp_path, *SHORT)
    assert result.exit_code == 2
    assert "'efficient_sam_ti' does not have SAM's own mask decoder" in result.stderr
