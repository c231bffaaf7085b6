"""Floor 3: the methods, one file each. Importing a file makes its method known."""
from .lora import LoraConfig

__all__ = ["LoraConfig"]
