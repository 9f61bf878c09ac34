"""Model registry (being written)."""
from dataclasses import dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    layer_kinds: dict
def resolve(model: str) -> ModelRow:
    return ModelRow(layer_kinds={"full_attention": dict(num_q_heads=32, num_kv_heads=8, head_dim=128)})
