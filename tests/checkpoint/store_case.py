"""A store and a small model without an optimizer, in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from parallel.mesh import Mesh
from sbtrain.checkpoint.ledger import Ledger
from sbtrain.checkpoint.state import RunState
from sbtrain.checkpoint.store import Store
from sbtrain.config.model_schema import GLAConfig, ModelConfig
from sbtrain.config.schema import Precision
from sbtrain.model.build import build_model

MODEL = ModelConfig(
    pattern="LS", vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=16,
    norm_eps=1e-5, rope_theta=1e4, max_positions=64, tie_embeddings=True, qkv_bias=False, qk_norm=False, window=5,
    gla=GLAConfig(gate_rank=2), vocab_multiple=4,
)  # fmt: skip


class Saved:
    """A store and the model it saves, in one process."""

    def __init__(self, folder: Path, mesh: Mesh, keep_last: int = 2):
        self.folder, self.mesh, self.ledger = folder, mesh, Ledger(folder)
        self.store = Store(folder, self.ledger, keep_last=keep_last, op_table={"hash": "0123"})
        self.model = build_model(MODEL, mesh, precision=Precision.fp32, seq_len=16)

    def save(self, step: int) -> Path:
        """Save weights that are all `step`."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(step)
        self.store.save_weights(self.model, self.mesh, RunState(stage="a", step=step, tokens=10 * step))
        return self.folder / "checkpoints" / f"step_{step}"

    def load(self) -> RunState | None:
        """Load the newest checkpoint into the model, as training does."""
        engine = SimpleNamespace(models=[self.model], mesh=self.mesh, load_state_dict=lambda loaded: None)
        return self.store.restore(engine)

    def there(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())
