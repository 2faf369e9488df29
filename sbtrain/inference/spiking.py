"""Suite spiking: what spikes cost in bits per byte, and how sparse they are, by layer and projection, over k.

Any model will do. One that was trained without spikes gets its neurons here, as the released code puts them in behind
training; weights stay as they are. Figures are defined in sbtrain.spiking.statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

from torch import Tensor
from tqdm import tqdm

import ops
from parallel.mesh import Mesh
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.spiking_schema import LARGEST_K, SpikingConfig
from sbtrain.inference import bits
from sbtrain.inference.bits import BitsOptions, Passage, judge, passages
from sbtrain.inference.load import Loaded, Where, load_model
from sbtrain.spiking.neuron import Neuron, Replacement, neurons, set_share
from sbtrain.spiking.statistics import SpikeStatistics, Tally, tallies

RASTER_TOKENS, RASTER_CHANNELS, NUM_RASTERS = 16, 96, 3

SITES = ("qkv", "gate", "queries", "proj", "gate_up", "down")
"""In the order of a layer. A gate that reads what q, k and v read has no neuron of its own."""


@dataclass(frozen=True)
class SpikingOptions(BitsOptions):
    """What is read, as in suite bpb, and the neurons' k.

    k: spikes per mean activation, of all neurons; the text is read once for each. The model's own, k and layer_k of
    model.spiking, is always among them and shown in detail. spike_down_proj: the down projection of FFNs spikes too,
    also where model.spiking has it not.
    """

    lengths: tuple[int, ...] = (1024,)
    k: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5, 4.0)
    spike_down_proj: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.k or not all(0 < k <= LARGEST_K for k in self.k):
            raise ValueError(
                f"k= must name positive numbers up to {LARGEST_K:g}, spikes per mean activation, for example k=2,3,4"
            )
        if len(set(self.k)) < len(self.k):
            raise ValueError("k= names a number twice; keep one of them")


def check(where: Where, options: SpikingOptions) -> None:
    """Raise ValueError as suite bpb does, and for INT8 weights that are multiplied as integers."""
    where.refuse_int8("suite spiking measures with and without spikes, integers know no without")
    bits.check(where, options)


def load(where: Where, options: SpikingOptions, mesh: Mesh) -> Loaded:
    """The model with neurons: its own, or where it was trained without those that model.spiking describes."""

    def with_neurons(config: ModelConfig) -> ModelConfig:
        down = config.spiking.spike_down_proj or options.spike_down_proj
        # without and with spikes, and nothing on the way, wherever training had come
        return replace(config, spiking=replace(config.spiking, enabled=True, spike_down_proj=down, warm_in_tokens=0))

    return load_model(where, mesh, change=with_neurons)


def run(loaded: Loaded, options: SpikingOptions) -> dict:
    """{off: {results, mean}, sweep, shown, rasters}.

    sweep: [{k, layer_k, results, mean, cost, total, projections, layers, sites}]. results: as of suite bpb. mean: of
    their bits per byte. cost: by how much, of 1, the mean is above that without spikes. total and the entries of
    projections, layers and sites ("layer.projection"): SpikeFigures of the text's tokens, meta tokens left out. shown:
    the model's own point in the sweep, which tables and plots show. rasters: counts of a few tokens. The model is left
    as it was loaded. Raises what suite bpb raises, and ValueError where the model has no neurons.
    """
    text, found = passages(loaded, options), neurons(loaded.model)
    if not found:
        raise ValueError("suite spiking finds no neurons: model.spiking.skip leaves out every projection")
    points, shown = _points(loaded.config.spiking, options)
    num_meta = loaded.config.meta.num_tokens
    with _restored(loaded, found):
        set_share(loaded.model, 0.0)
        off = _scored(loaded, text)
        set_share(loaded.model, 1.0)
        sweep, rasters = [], []
        for spiking in tqdm(points, desc="spiking", unit="k", disable=None):
            watchers = [_watch(neuron, spiking.k_of(neuron.layer), num_meta) for neuron in found]
            point = {"k": spiking.k, "layer_k": spiking.layer_k, **_scored(loaded, text)}
            sweep.append({**point, "cost": point["mean"] / off["mean"] - 1, **_figures(watchers)})
            rasters = _rasters(watchers) if len(sweep) - 1 == shown else rasters
    return {"off": off, "sweep": sweep, "shown": shown, "rasters": rasters}


def _points(own: SpikingConfig, options: SpikingOptions) -> tuple[list[SpikingConfig], int]:
    """What the text is read with, and which of it is the model's own: first where layers differ, else by its k."""
    by_layer = any(k != own.k for k in own.layer_k.values())
    ks = options.k if by_layer or own.k in options.k else sorted((*options.k, own.k))
    points = [replace(own, k=k, layer_k={}) for k in ks]
    return ([own, *points], 0) if by_layer else (points, ks.index(own.k))


@dataclass
class Watcher:
    """A neuron's observer: sums over its counts of the text, and those of its first tokens.

    num_meta: rows before the text in each input.
    """

    neuron: Neuron
    num_meta: int
    statistics: SpikeStatistics | None = None
    first: list[Tensor] = field(default_factory=list)

    def __call__(self, neuron: Neuron, x: Tensor, mean_abs: Tensor | None, counted: Tensor | None) -> None:
        """Called with the neuron's input before its spikes are counted. counted: as `Neuron.spike` takes it."""
        count, _ = ops.spike_count(x, k=neuron.k, mean_abs=mean_abs)
        count = count.flatten(2) if neuron.site == "queries" else count  # the channels of all heads
        count = count.reshape(-1, count.shape[-1])
        count = count[self.num_meta :] if counted is None else count[counted]
        if self.statistics is None:
            self.statistics = SpikeStatistics(count.shape[-1], device=count.device)
            self.first.append(count[:RASTER_TOKENS, :RASTER_CHANNELS].clone())
        self.statistics.add(count)


def _watch(neuron: Neuron, k: float, num_meta: int) -> Watcher:
    neuron.k, neuron.observer = k, Watcher(neuron, num_meta)
    return neuron.observer


@contextmanager
def _restored(loaded: Loaded, found: list[Neuron]) -> Iterator[None]:
    """Afterwards as much is replaced as before, each neuron has its own k, and nobody watches."""
    ks = [neuron.k for neuron in found]
    shares = [(module, module.share) for module in loaded.model.modules() if isinstance(module, Replacement)]
    try:
        yield
    finally:
        for module, share in shares:
            module.share = share
        for neuron, k in zip(found, ks, strict=True):
            neuron.k, neuron.observer = k, None


def _scored(loaded: Loaded, text: list[Passage]) -> dict:
    results = [{"source": each.source, "length": each.length, **judge(loaded, each)} for each in text]
    return {"results": results, "mean": sum(result["bits_per_byte"] for result in results) / len(results)}


def _figures(watchers: list[Watcher]) -> dict:
    """Of all neurons that tokens have reached, together and by projection, layer, and both."""
    reached = [watcher for watcher in watchers if watcher.statistics is not None]
    found = list(zip(reached, tallies([watcher.statistics for watcher in reached])))
    found.sort(key=lambda pair: (pair[0].neuron.layer, SITES.index(pair[0].neuron.site)))
    there = {watcher.neuron.site for watcher in reached}
    groups: dict[str, dict[str, list[Tally]]] = {
        "projections": {site: [] for site in SITES if site in there},
        "layers": {},
        "sites": {},
    }
    for watcher, tally in found:
        site, layer = watcher.neuron.site, str(watcher.neuron.layer)
        for kind, name in (("projections", site), ("layers", layer), ("sites", f"{layer}.{site}")):
            groups[kind].setdefault(name, []).append(tally)
    named = {
        kind: {name: reduce(add, members).figures().plain() for name, members in group.items()}
        for kind, group in groups.items()
    }
    return {"total": reduce(add, [tally for _, tally in found]).figures().plain(), **named}


def _rasters(watchers: list[Watcher]) -> list[dict]:
    """The counts of a few tokens at one projection of the first, the middle and the last layer."""
    sites = [watcher.neuron.site for watcher in watchers]
    there = [watcher for watcher in watchers if watcher.neuron.site == sites[0] and watcher.first]
    chosen = sorted({round(i * (len(there) - 1) / (NUM_RASTERS - 1)) for i in range(NUM_RASTERS)})
    return [
        {"layer": watcher.neuron.layer, "site": watcher.neuron.site, "counts": watcher.first[0].tolist()}
        for watcher in (there[i] for i in chosen)
    ]
