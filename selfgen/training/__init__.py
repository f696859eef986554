"""Training on self-generated contexts: one trainer a file, and what they share."""

from .bash import BASHTrainer
from .bss import BSSTrainer
from .config import BSSConfig
from .rac import RACConfig, RACTrainer
from .rounds import train_rounds

__all__ = ["BASHTrainer", "BSSConfig", "BSSTrainer", "RACConfig", "RACTrainer", "train_rounds"]
