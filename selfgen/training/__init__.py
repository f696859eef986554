"""Training on self-generated contexts: one trainer a file, and what they share."""

from .bash import BASHTrainer
from .bss import BSSTrainer
from .config import BSSConfig
from .rac import RACConfig, RACTrainer
from .report import write_report
from .rounds import train_rounds

__all__ = ["BASHTrainer", "BSSConfig", "BSSTrainer", "RACConfig", "RACTrainer", "train_rounds", "write_report"]
