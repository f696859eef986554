"""Models and tokenizers from a folder or the hub, with errors that name the file at fault."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import tokenizers
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from ..context.models import MissingWeightsError, check_there, load_whole
from ..files import code_in

_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.index.json", "*.safetensors",
    "pytorch_model*.bin", "adapter_model.bin",
)  # fmt: skip
_OF_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """``auto_class.from_pretrained(name, **options)``.

    Raises:
        FileNotFoundError: nothing of that name is here or on the hub.
        ValueError: a file is broken, weights are missing, or something comes with code that is not trusted.
        ImportError: a package is missing.
    """
    is_model = "Tokenizer" not in auto_class.__name__
    check_there(name, options.get("revision"))
    try:
        return load_whole(auto_class, name, **options) if is_model else auto_class.from_pretrained(name, **options)
    except (ImportError, MissingWeightsError):
        raise
    except Exception as error:  # broken files raise anything, tokenizers' a bare Exception
        if fault := _fault(name, options.get("revision")):
            raise ValueError(f"model {name!r} can't be loaded: {fault}; get the file again") from error
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name!r} comes with code of its own, which is not run by itself: read it, and give "
                "--trust-remote-code yes"
            ) from error
        if isinstance(error, OSError | SafetensorError):
            raise FileNotFoundError(
                f"model {name!r} is neither a folder with a checkpoint, nor could it be loaded from the hub; "
                f"check the path or name, the revision and the network: {error}"
            ) from error
        if not is_model and Path(name).is_dir() and not any(any(Path(name).glob(one)) for one in _OF_TOKENIZERS):
            raise ValueError(
                f"model {name!r} has no tokenizer ({', '.join(_OF_TOKENIZERS)}), as adapters are saved without: put "
                f"it there with tokenizer.save_pretrained({name!r})"
            ) from error
        what = "configuration or weights" if is_model else "tokenizer"
        raise ValueError(f"the {what} of model {name!r} can't be loaded: {type(error).__name__}: {error}") from error


def _fault(name: str, revision: str | None) -> str | None:
    """The first file of a model that can't be read, and why."""
    folder = _folder_of(name, revision)
    for file in sorted(file for pattern in _FILES for file in folder.glob(pattern)) if folder else []:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    continue
            if file.suffix == ".bin":
                if not zipfile.is_zipfile(file):
                    return f"{file} is no archive of torch.save"
                if code := code_in(file):
                    return f"{file} would run {code[0]} when it is loaded, so it isn't"
                continue
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                return f"{file} is no JSON object"
            if file.name.endswith(".index.json") and not isinstance(found.get("weight_map"), dict):
                return f"{file} has no weight_map"
            if file.name == "tokenizer.json":
                tokenizers.Tokenizer.from_file(str(file))
        except json.JSONDecodeError as error:
            return f"{file}, line {error.lineno}: broken JSON ({error.msg})"
        except UnicodeDecodeError as error:
            return f"{file} is not UTF-8 ({error.reason} at byte {error.start})"
        except SafetensorError as error:
            return f"{file} holds no whole weights ({error})"
        except OSError as error:
            return f"{file} can't be read ({error.strerror or error})"
        except Exception as error:  # tokenizers has no class of its own
            return f"{file} can't be read ({error})"
    return None


def _folder_of(name: str, revision: str | None) -> Path | None:
    """Where the files of a model are, if they are here."""
    if Path(name).is_dir():
        return Path(name)
    try:
        file = cached_file(name, "config.json", revision=revision, local_files_only=True)
    except OSError:
        return None
    return Path(file).parent if file else None
