"""A Llama in plain torch, from a checkpoint folder to logits."""
