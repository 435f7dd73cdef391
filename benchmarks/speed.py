"""How fast the library is, as ratios to plain loops that run in the same process, on one thread.

    python benchmarks/speed.py [--quick] [--json FILE]

Every comparison first checks that both sides give the same result, then times them in turns and divides the medians of
processor time. Each comparison has a process of its own. Peak memory is measured for two sizes of zoo.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

import plain
import torch
from torch import Tensor

from weightspace.cli.main import tune_process
from weightspace.data.images import load_images
from weightspace.io.writing import checkpoint_bytes
from weightspace.networks.alignment import align
from weightspace.networks.families import Network, initialize
from weightspace.networks.flat import flatten, unflatten
from weightspace.networks.infer import infer_architecture
from weightspace.networks.permutation import permute, random_permutations
from weightspace.networks.population import Recipe, Snapshot, train_population
from weightspace.schema import Architecture, ImageDataset, ModelRef, TensorSpec, ZooEntry
from weightspace.tokenizers import get_tokenizer
from weightspace.zoo.training import ZooSettings, draw_recipes
from weightspace.zoo.views import permuted_views
from weightspace.zoo.writer import ZooWriter

CNN_SHAPES = {
    "0.weight": (8, 1, 5, 5),
    "0.bias": (8,),
    "3.weight": (6, 8, 5, 5),
    "3.bias": (6,),
    "6.weight": (4, 6, 2, 2),
    "6.bias": (4,),
    "9.weight": (20, 36),
    "9.bias": (20,),
    "11.weight": (10, 20),
    "11.bias": (10,),
}
"""The 2,464-parameter CNN of published MNIST and SVHN zoos; its widest row has 201 entries."""
TOKEN_SIZE = 201
CHUNK = 256
"""Models that the library tokenises at a time when it reads a zoo."""
VIEWS = 5
SWEEPS = 20


@dataclass(frozen=True)
class Size:
    """How much work one run does."""

    models: int = 1000
    repetitions: int = 5
    stacked: int = 200
    alone: int = 10
    steps: int = 250
    layers: int = 30
    zoos: tuple[int, int] = (2000, 8000)


QUICK = Size(models=64, repetitions=2, stacked=32, alone=2, steps=10, layers=3, zoos=(512, 1024))


@dataclass(frozen=True)
class Result:
    """One comparison: seconds (or bytes) of both sides for the same work.

    Attributes:
        what: the work.
        baseline: what it is compared with.
        ours: median of the library.
        theirs: median of the baseline, scaled to the same number of models.
        goal: the ratio to reach; None where there is none.
        unit: of ``ours`` and ``theirs``.
    """

    what: str
    baseline: str
    ours: float
    theirs: float
    goal: float | None
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal


# --- measuring -------------------------------------------------------------------------------------------------------


def medians(repetitions: int, *works: Callable[[], object]) -> list[float]:
    """Milliseconds of processor time of each work; they take turns, so that a busy moment hits all of them."""
    times: list[list[float]] = [[] for _ in works]
    for repetition in range(repetitions + 1):
        for work, column in zip(works, times, strict=True):
            start = time.process_time()
            work()
            if repetition:  # the first round fills caches
                column.append(1e3 * (time.process_time() - start))
    return [statistics.median(column) for column in times]


def expect(equal: bool, what: str) -> None:
    if not equal:
        sys.exit(f"{what}: the library and the plain loop give different results; nothing was timed")


def chunks(models: Tensor) -> Iterable[Tensor]:
    return models.split(CHUNK)


def machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{model}, {os.cpu_count()} cores, 1 thread used, {platform.system()}, {versions}"


# --- many small models -----------------------------------------------------------------------------------------------


def architecture_of(shapes: dict[str, tuple[int, ...]]) -> Architecture:
    return infer_architecture([TensorSpec(name, shape, "F32") for name, shape in shapes.items()])


def population(models: int) -> tuple[Architecture, Tensor, list[dict[str, Tensor]]]:
    """Random CNNs, as flat vectors and as separate state dicts."""
    architecture = architecture_of(CNN_SHAPES)
    flat = torch.randn(models, architecture.numel, generator=torch.Generator().manual_seed(0)) * 0.1
    separate = [{name: value.clone() for name, value in unflatten(row, architecture).items()} for row in flat.unbind()]
    return architecture, flat, separate


def measure_tokens(size: Size) -> list[Result]:
    architecture, flat, models = population(size.models)
    tokenizer = get_tokenizer("channel", TOKEN_SIZE)
    tokens = tokenizer.tokenize_batch(flat, architecture)
    expect(torch.equal(tokens, torch.stack([plain.tokenize_by_row(m, TOKEN_SIZE) for m in models])), "tokenise")
    expect(torch.equal(tokens, torch.stack([plain.tokenize_by_layer(m, TOKEN_SIZE) for m in models])), "tokenise")
    expect(torch.equal(tokenizer.detokenize_batch(tokens, architecture), flat), "detokenise")
    restored = [flatten(plain.detokenize_by_row(t, CNN_SHAPES), architecture) for t in tokens]
    expect(torch.equal(torch.stack(restored), flat), "detokenise")

    def ours() -> None:
        for part in chunks(flat):
            tokenizer.tokenize_batch(part, architecture)

    def loop(tokenize: Callable[[dict[str, Tensor], int], Tensor]) -> None:
        for model in models:
            tokenize(model, TOKEN_SIZE)

    def ours_back() -> None:
        for part in chunks(tokens):
            tokenizer.detokenize_batch(part, architecture)

    def loop_back() -> None:
        for part in tokens:
            plain.detokenize_by_row(part, CNN_SHAPES)

    chunked, whole, by_row, by_layer, back, back_by_row = medians(
        size.repetitions,
        ours,
        lambda: tokenizer.tokenize_batch(flat, architecture),
        lambda: loop(plain.tokenize_by_row),
        lambda: loop(plain.tokenize_by_layer),
        ours_back,
        loop_back,
    )
    name = f"tokenise {size.models:,} CNNs"
    return [
        Result(name, "loop over models, layers and channels", chunked, by_row, 25),
        Result(name, "loop over models and layers", chunked, by_layer, None),
        Result(f"{name} into one tensor", "loop over models, layers and channels", whole, by_row, None),
        Result(f"detokenise {size.models:,} CNNs", "loop over models, layers and channels", back, back_by_row, 50),
    ]


def measure_views(size: Size) -> list[Result]:
    architecture, flat, models = population(size.models)
    tokenizer = get_tokenizer("channel", TOKEN_SIZE)
    generator = torch.Generator().manual_seed(1)
    drawn = random_permutations(architecture, len(flat), generator)
    ours = tokenizer.tokenize_batch(permute(flat, drawn, architecture), architecture)
    for number, model in enumerate(models):
        view = plain.permute(model, architecture.groups, [p[number] for p in drawn])
        expect(torch.equal(plain.tokenize_by_row(view, TOKEN_SIZE), ours[number]), "permuted views")

    def batched() -> None:
        for part in flat.split(CHUNK // 2):
            tokenizer.tokenize_batch(permuted_views(part, architecture, VIEWS, generator), architecture)

    def loop(tokenize: Callable[[dict[str, Tensor], int], Tensor]) -> None:
        for model in models:
            for _ in range(VIEWS):
                permutations = plain.draw_permutations(architecture.groups)
                tokenize(plain.permute(model, architecture.groups, permutations), TOKEN_SIZE)

    fast, by_row, by_layer = medians(
        size.repetitions, batched, lambda: loop(plain.tokenize_by_row), lambda: loop(plain.tokenize_by_layer)
    )
    name = f"{VIEWS} permuted views of {size.models:,} CNNs, tokenised"
    return [
        Result(name, "loop over models, views, layers and channels", fast, by_row, 50),
        Result(name, "loop over models, views and layers", fast, by_layer, None),
    ]


def measure_alignment(size: Size) -> list[Result]:
    architecture, flat, models = population(size.models)
    reference, separate = models[0], [{n: v.numpy() for n, v in model.items()} for model in models]
    target = {name: value.numpy() for name, value in reference.items()}

    def ours() -> Tensor:
        return align(flat, flat[0], architecture, sweeps=SWEEPS)[0]

    def loop() -> list[dict[str, Any]]:
        return [plain.align(model, target, architecture, SWEEPS) for model in separate]

    found = torch.stack([flatten({n: torch.from_numpy(v) for n, v in m.items()}, architecture) for m in loop()])
    expect(torch.equal(found, ours()), "align")
    fast, slow = medians(size.repetitions, ours, loop)
    return [Result(f"align {size.models:,} CNNs to one", "loop over models and groups", fast, slow, 5)]


# --- training --------------------------------------------------------------------------------------------------------


def measure_training(size: Size, family: str, goal: float) -> Result:
    """Trains ``size.stacked`` models together and ``size.alone`` one after another, and compares times a model."""
    settings = ZooSettings()
    chosen = next(config for config in settings.architectures if config["family"] == family)
    grid = replace(
        settings,
        architectures=(chosen,),
        class_subsets=settings.class_subsets[:1],
        rotations=(0,),
        polarities=("normal",),
        activations=settings.activations[:1],
        train_sizes=(min(settings.train_sizes),),
        label_noise=(0.0,),
        steps=(size.steps,),
        runs=size.stacked,
    )
    recipes = draw_recipes(grid)
    images = load_images(recipes[0].dataset)

    def together(members: list[Recipe]) -> Snapshot:
        datasets = {images.id: images}
        (snapshot,) = train_population(
            members, datasets, checkpoints=(1.0,), batch_size=grid.batch_size, seed=0, device="cpu"
        )
        return snapshot

    few = recipes[: size.alone]
    initial, rows, batches = same_draws(few, images, grid.batch_size)

    def one_by_one() -> list[tuple[torch.nn.Module, float, float]]:
        trained = []
        for number, recipe in enumerate(few):
            module = Network(recipe.config)
            module.load_state_dict({name: value[number] for name, value in initial.items()})
            own, labels = images.train_images[rows[number]], images.train_labels[rows[number]]
            plain.train(module, own, labels, batches[number], recipe.learning_rate, recipe.weight_decay)
            test = plain.score(module, images.test_images, images.test_labels)
            trained.append((module, test[0], plain.score(module, own, labels)[0]))
        return trained

    check_training(together(few), one_by_one(), family)
    fast, slow = medians(size.repetitions, lambda: together(recipes), one_by_one)
    name = f"train {size.stacked} {family.upper()}s for {size.steps} steps"
    scaled = slow * size.stacked / size.alone
    return Result(name, f"torch.optim.AdamW, {size.alone} models one by one, scaled", fast, scaled, goal)


def check_training(snapshot: Snapshot, alone: list[tuple[torch.nn.Module, float, float]], family: str) -> None:
    """Both sides do the same steps on the same images in another order of additions, so they agree to some digits."""
    for place, member in enumerate(snapshot.members):
        module, test, train = alone[member]
        pairs = [(stacked[place], module.state_dict()[name]) for name, stacked in snapshot.parameters.items()]
        scores = snapshot.results["test_accuracy"][place] - test, snapshot.results["train_accuracy"][place] - train
        expect(all(torch.allclose(*pair, rtol=1e-2, atol=1e-3) for pair in pairs), f"train {family}")
        expect(max(abs(float(score)) for score in scores) < 0.02, f"train {family}")


def same_draws(
    recipes: list[Recipe], images: ImageDataset, batch_size: int
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Initial weights, training images and batches, drawn in the order in which `train_population` draws them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for recipe in recipes:
        rows.append(torch.randperm(len(images.train_images), generator=generator)[: recipe.train_size])
        torch.rand(recipe.train_size, generator=generator)  # who gets a wrong label, and which: nobody here
        torch.randint(images.classes, (recipe.train_size,), generator=generator)
    initial = initialize(recipes[0].config, [recipe.initialization for recipe in recipes], generator)
    draws = [torch.rand(len(recipes), batch_size, generator=generator) for _ in range(recipes[0].steps)]
    batches = (torch.stack(draws, dim=1) * recipes[0].train_size).long()
    return initial, rows, list(batches)


# --- one large checkpoint --------------------------------------------------------------------------------------------


def measure_large(size: Size) -> list[Result]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(size.layers):
        shapes |= {f"blocks.{number}.weight": (1024, 4096), f"blocks.{number}.bias": (1024,)}
    architecture = architecture_of(shapes)
    generator = torch.Generator().manual_seed(2)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    results = []
    for kind in ("dense", "channel"):
        tokenizer = get_tokenizer(kind, 64)
        restored = tokenizer.detokenize(tokenizer.tokenize(tensors, architecture))
        expect(all(torch.equal(restored[name], tensor) for name, tensor in tensors.items()), f"{kind} tokens")
        del restored
        tokens, copy = medians(
            min(size.repetitions, 5),
            lambda tokenizer=tokenizer: tokenizer.tokenize(tensors, architecture),
            lambda: {name: tensor.clone() for name, tensor in tensors.items()},
        )
        name = f"tokenise one checkpoint of {megabytes:,.0f} MB ({kind})"
        results.append(Result(name, "clone of its tensors", tokens, copy, 0.25))
    return results


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(size: Size) -> list[Result]:
    """Peak memory of two zoos; the ratio is how much the zoo grew by how much the peak did."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for models in size.zoos:
            write_zoo(Path(folder) / str(models), models)
        for work in ("tokenise", "embed"):
            small, large = (peak_of(work, Path(folder) / str(models)) for models in size.zoos)
            low, high = size.zoos
            results.append(
                Result(f"peak memory: {work} {high:,} models", f"{low:,} models", large, small, None, unit="MB")
            )
    return results


def write_zoo(path: Path, models: int) -> None:
    writer = ZooWriter(path, settings={"models": models})
    for start in range(0, models, 512):
        _, _, separate = population(min(512, models - start))
        names = [f"model-{start + number:06d}" for number in range(len(separate))]
        entries = [ZooEntry(name, name, ModelRef(name)) for name in names]
        writer.write_shard(f"{start:06d}", entries, [checkpoint_bytes(model) for model in separate])
    writer.finish()


def peak_of(work: str, zoo: Path) -> float:
    """Peak resident memory of doing ``work`` with a zoo in a process of its own, in MB above what imports take."""
    command = [sys.executable, __file__, "--peak", work, str(zoo)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_peak(work: str, path: str) -> None:
    from weightspace.encoder import Encoder, embed_zoo
    from weightspace.models.autoencoder.configuration_autoencoder import WeightAutoencoderConfig
    from weightspace.models.autoencoder.feature_extraction_autoencoder import WeightFeatureExtractor
    from weightspace.models.autoencoder.modeling_autoencoder import WeightAutoencoderModel
    from weightspace.zoo.dataset import load_zoo

    config = WeightAutoencoderConfig(token_size=TOKEN_SIZE, hidden_size=32, intermediate_size=64)
    extractor = WeightFeatureExtractor("channel", TOKEN_SIZE)
    encoder = Encoder(Path(), WeightAutoencoderModel(config).eval(), extractor)
    before = peak_so_far()
    zoo = load_zoo(path)
    if work == "embed":
        embed_zoo(encoder, zoo)
    else:
        tokenizer = get_tokenizer("channel", TOKEN_SIZE)
        for batch in zoo.batches(chunk=CHUNK):
            tokenizer.tokenize_batch(batch.flat, batch.architecture)
    print(peak_so_far() - before)


def peak_so_far() -> float:
    """Peak resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage starts with the peak of the parent process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# --- the table -------------------------------------------------------------------------------------------------------


def print_table(results: list[Result]) -> None:
    head = ("work", "baseline", "ours", "baseline's", "ratio", "goal", "met")
    rows = [
        (
            result.what,
            result.baseline,
            f"{result.ours:,.4g} {result.unit}",
            f"{result.theirs:,.4g} {result.unit}",
            f"{result.ratio:.3g}",
            "" if result.goal is None else f"{result.goal:g}",
            {None: "", True: "yes", False: "no"}[result.met],
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, tuple("-" * width for width in widths), *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def tune() -> None:
    torch.set_num_threads(1)
    tune_process()  # memory is kept as in every command; the plain loops profit as well


def apart(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a comparison in a process of its own, so that none works in the scattered memory of another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=tune) as executor:
        return executor.submit(measure, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        tune()
        print_peak(*arguments.peak)
        return
    size = QUICK if arguments.quick else Size()
    print(machine(), flush=True)
    results = [
        *apart(measure_tokens, size),
        *apart(measure_views, size),
        *apart(measure_alignment, size),
        apart(measure_training, size, "mlp", 20),
        apart(measure_training, size, "cnn", 2.5),
        *apart(measure_large, size),
        *measure_memory(size),
    ]
    print_table(results)
    if arguments.json:
        records = [{**asdict(result), "ratio": result.ratio, "met": result.met} for result in results]
        arguments.json.write_text(json.dumps({"machine": machine(), "results": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
