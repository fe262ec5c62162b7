"""How many people `visling serve` answers at once, how long they wait, and how much memory that takes.

    # 50 clients, about four minutes, two of them for training a model of demo size a few steps:
    python benchmarks/serving.py --out benchmarks/results

The server is `visling serve` in a process of its own, on a model that was trained for a few steps on scenes drawn for
the purpose: what it has learnt changes no time. The clients are threads of this process, each with a connection of its
own, which ask as fast as they are answered. In a round every client

    uploads     a picture of its own, as a JPEG file of a photograph's size
    answers     asks questions about it, none of them twice
    documents   asks what the model looked at (`/api/inspect`), which no two share

with a barrier between the three. A request that is not answered ends the benchmark without a result. One client alone
does the same before: what it waits is the least that anyone waits.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The script's folder is on the path: benchmarks share how results are written.
from measuring import SEED, circumstances, describe, load_averages, machine, summary, versions, write_result
from PIL import Image

from visling import config as configs
from visling.recipes.detectors import detect_config
from visling.recipes.tables import FINETUNING
from visling.regions.writer import StoreWriter
from visling.runs.detect import train_detector
from visling.runs.finetune import finetune
from visling.scenes import ScenesConfig, write_scenes
from visling.vision.detectors import load_detector
from visling.vision.extract import extract
from visling.vision.image_files import find_images

WORK = ("uploads", "answers", "documents")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "brown", "black")
REGIONS = 8
"""Of every picture, at least: a detector that has learnt little is sure of nothing."""
SHAPES = ("circles", "squares", "triangles", "stars", "hearts", "moons", "rings", "crosses", "diamonds")

NOT_CLAIMED = (
    "Clients and server share one machine and its cores: on two machines the server has more of them to itself.",
    "The model is of demo size, on drawn scenes; a model of base size takes as much longer as its forward pass does.",
    "Clients do not pause to read; so many people who do are answered sooner.",
    "Other work on the machine disturbs timings: the load averages tell whether there was any.",
)


def make_run(folder: Path, options: argparse.Namespace) -> Path:
    """A fine-tuned model with its detector, trained for a few steps."""
    scenes, detector, regions, run = (folder / name for name in ("scenes", "detector", "regions", "vqa"))
    write_scenes(scenes, ScenesConfig(images=options.images, panels=0, questions_per_image=4))
    tiny = options.size == "tiny"
    small = ["detector.long_side=64", "detector.channels=[8, 12]", "detector.blocks=[0, 0]", "detector.feature_size=16"]
    learnt = [f"train.max_steps={options.steps}", f"detector.min_regions={REGIONS}"]
    config = detect_config([*learnt, *(small if tiny else [])], "scenes")
    pictures, boxes = scenes / "images", scenes / "annotations"
    with contextlib.redirect_stdout(sys.stderr):
        train_detector(pictures / "train", boxes / "instances_train.json", detector, config, device="cpu")
        found = load_detector(detector)
        with StoreWriter(
            regions,
            feature_size=found.feature_size,
            fingerprint=found.fingerprint,
            class_names=found.class_names,
            attribute_names=found.attribute_names,
            settings={"detector": str(detector)},
        ) as writer:
            extract(find_images(scenes), found, writer)
        settings = [f"train.max_steps={options.steps}", "train.precision=fp32", *(["encoder=tiny"] if tiny else [])]
        recipe = configs.override(FINETUNING[f"{options.model}-vqa-scenes"](), settings)
        finetune(recipe, run, data=scenes, store=regions, device="cpu")
    return run


def draw_pictures(run: Path, options: argparse.Namespace) -> list[bytes]:
    """A JPEG file for each client: a scene at another size, with noise of its own."""
    rng = np.random.default_rng(SEED)
    scenes = find_images(run.parent / "scenes" / "images")
    files = []
    for number in range(options.clients):
        with Image.open(scenes[number % len(scenes)]) as scene:
            pixels = np.array(scene.convert("RGB").resize((options.width, options.height)), np.int16)
        noisy = np.clip(pixels + rng.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


@contextlib.contextmanager
def serving(run: Path, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """A server in a process of its own; its process id and port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "visling", "serve", "--run", str(run), "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
    )
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start: its message is above.")
        yield process.pid, int(found[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


class Client:
    """Somebody with one connection and one picture."""

    def __init__(self, number: int, port: int, picture: bytes, run: str) -> None:
        self.number, self.picture, self.run = number, picture, run
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.image = ""
        self._asked = 0

    def uploads(self) -> None:
        """Send the picture."""
        self.image = self._post("/api/images", self.picture)["id"]

    def answers(self) -> None:
        """Ask another question about it."""
        self._post("/api/answer", self._next_question())

    def documents(self) -> None:
        """Ask for what the model looked at."""
        self._post("/api/inspect", self._next_question())

    def _next_question(self) -> bytes:
        self._asked += 1
        color = COLORS[(self.number + self._asked) % len(COLORS)]
        text = f"how many {color} {SHAPES[self._asked % len(SHAPES)]} are there?"
        return json.dumps({"run": self.run, "images": [self.image], "text": text}).encode()

    def _post(self, address: str, body: bytes) -> Any:
        self.connection.request("POST", address, body, {"Content-Type": "application/json"})
        answered = self.connection.getresponse()
        content = answered.read()
        if answered.status != 200:
            raise SystemExit(f"{address} failed with {answered.status}: {content.decode()[:500]}")
        return json.loads(content)


def ask_together(clients: Sequence[Client], work: str, times: int) -> tuple[float, list[float]]:
    """Seconds until all clients have done a work so many times, and those of each request."""
    ready = threading.Barrier(len(clients) + 1)

    def ask(client: Client) -> list[float]:
        do: Callable[[], None] = getattr(client, work)
        ready.wait()
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            do()
            seconds.append(time.perf_counter() - start)
        return seconds

    with ThreadPoolExecutor(len(clients)) as threads:
        asking = [threads.submit(ask, client) for client in clients]
        ready.wait()
        start = time.perf_counter()
        waited = [seconds for one in asking for seconds in one.result()]
        return time.perf_counter() - start, waited


def measure_round(clients: Sequence[Client], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Requests a second and milliseconds of each kind of work."""
    found = {}
    for work, times in zip(WORK, (1, options.questions, options.documents), strict=True):
        seconds, waited = ask_together(clients, work, times)
        median, late = np.percentile(waited, [50, 95])
        found[work] = {"a second": len(waited) / seconds, "p50 ms": median * 1e3, "p95 ms": late * 1e3}
    return found


def read_memory(process: int, field: str) -> float | None:
    """MiB of a process: VmRSS now, VmHWM at its peak; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rates and latencies of one client and of all, and the server's memory."""
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        run = make_run(Path(temporary), options)
        pictures = draw_pictures(run, options)
        with serving(run, options) as (process, port):
            name = f"{run.parent.name}/{run.name}"
            clients = [Client(number, port, picture, name) for number, picture in enumerate(pictures)]
            measure_round(clients[:1], options)  # warm
            loaded = read_memory(process, "VmRSS")
            alone = [measure_round(clients[:1], options) for _ in range(options.rounds)]
            together, peaks = [], []
            for _ in range(options.rounds):
                together.append(measure_round(clients, options))
                peaks.append(read_memory(process, "VmHWM"))
            for client in clients:
                client.connection.close()
    return {
        "bytes_of_a_picture": int(np.mean([len(picture) for picture in pictures])),
        "one_client": _summarise(alone),
        "all_clients": _summarise(together),
        "memory_mib": {"with the model": loaded, "peak after each round": peaks},
    }


def _summarise(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Each measure of each work over all rounds."""
    return {
        work: {name: summary([one[work][name] for one in rounds]) for name in rounds[0][work]} for work in rounds[0]
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    settings, memory = result["settings"], result["memory_mib"]
    lines = [
        f"# People served at once, {result['date']}",
        "",
        f"`visling serve` on {settings['model']} of {settings['size']} size; pictures of {settings['width']} x "
        f"{settings['height']} pixels, {result['bytes_of_a_picture'] / 1000:.0f} kB each. {settings['clients']} "
        f"clients ask as fast as they are answered: {settings['questions']} questions and {settings['documents']} "
        f"documents each. No request failed. Median (smallest to largest) over {settings['rounds']} rounds.",
        "",
        "| | clients | a second | milliseconds, median | milliseconds, 95 of 100 within |",
        "|---|---|---|---|---|",
    ]
    for work in WORK:
        for kind, clients in (("one_client", 1), ("all_clients", settings["clients"])):
            found = result[kind][work]
            cells = [describe(found[name], ".0f") for name in ("a second", "p50 ms", "p95 ms")]
            lines.append(f"| {work} | {clients} | {' | '.join(cells)} |")
    if memory["with the model"] is not None:
        peaks = ", ".join(f"{peak:,.0f}" for peak in memory["peak after each round"])
        lines += [
            "",
            f"Memory of the server: {memory['with the model']:,.0f} MiB with the model after a first client, at its "
            f"peak {peaks} MiB after each round of all clients.",
        ]
    return "\n".join([*lines, "", *circumstances(result)]) + "\n"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how many people are served at once.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--model", default="visualbert", help="family")
    parser.add_argument("--size", choices=("tiny", "demo"), default="demo", help="of detector and model")
    parser.add_argument("--images", type=int, default=200, help="scenes to draw")
    parser.add_argument("--steps", type=int, default=150, help="updates of the detector and of the model")
    parser.add_argument("--clients", type=int, default=50, help="who ask at once")
    parser.add_argument("--questions", type=int, default=20, help="of each client in a round")
    parser.add_argument("--documents", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--width", type=int, default=640, help="of an uploaded picture, in pixels")
    parser.add_argument("--height", type=int, default=480, help="of an uploaded picture, in pixels")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch in the server")
    parser.add_argument("--folder", type=Path, help="where to put the temporary files (default: the system's place)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    date, load_before = datetime.date.today().isoformat(), load_averages()
    names = ("model", "size", "clients", "questions", "documents", "rounds", "width", "height", "threads", "steps")
    result = {
        "benchmark": "serving",
        "date": date,
        "machine": machine(torch.device("cpu")),
        "versions": versions("visling", "torch", "fastapi", "uvicorn"),
        "settings": {name: getattr(options, name) for name in names},
        "load_before": load_before,
        **measure(options),
        "load_after": load_averages(),
        "not_claimed": NOT_CLAIMED,
    }
    stem = f"serving_{date}_{options.model}-{options.size}_{options.clients}"
    print(write_result(options.out, stem, result, as_markdown(result)))


if __name__ == "__main__":
    main()
