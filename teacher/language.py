"""A teacher's words: its tokenizer, and how prompts and completions become token ids and text again. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from preceptor.artifacts import folder_sha256
from preceptor.errors import PreceptorError


class Words:
    """What a tokenizer and its end token are good for."""

    tokenizer: PreTrainedTokenizerBase
    end_id: int  # closes a completion in training

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt, with the tokenizer's opening token if it has one and no closing one."""
        ids: list[int] = list(self.tokenizer(prompt, return_attention_mask=False, verbose=False)["input_ids"])
        while ids and ids[-1] == self.end_id:
            ids.pop()
        return ids

    def completion_ids(self, completion: str) -> list[int]:
        """Ids of what follows a prompt, closed by the end token."""
        encoded = self.tokenizer(completion, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [*encoded["input_ids"], self.end_id]

    def text(self, ids: Sequence[int]) -> str:
        """What the ids of a completion say."""
        decoded = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded


@dataclass(frozen=True)
class Language(Words):
    """The words of a base whose weights are elsewhere."""

    tokenizer: PreTrainedTokenizerBase
    source: str  # folder or hub id
    commit: str  # content hash of the folder, or the hub's commit
    end_id: int
    end_ids: frozenset[int]  # end a completion in sampling
    context: int  # tokens


def ends_and_context(
    source: str, tokenizer: PreTrainedTokenizerBase, config: Any, generation: Any
) -> tuple[int, frozenset[int], int]:
    """The token that closes a completion, those that end one, and the context. Raises BAD_TEACHER_SOURCE."""
    if tokenizer.eos_token_id is None:
        raise PreceptorError("BAD_TEACHER_SOURCE", "the tokenizer names no end-of-sequence token", file=source)
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise PreceptorError("BAD_TEACHER_SOURCE", "config.json gives no max_position_embeddings", file=source)
    listed = generation.eos_token_id if generation is not None else None
    ends = listed if isinstance(listed, list) else [] if listed is None else [listed]
    end_id = int(tokenizer.eos_token_id)
    return end_id, frozenset({end_id, *map(int, ends)}), context


def load_language(source: str, revision: str = "") -> Language:
    """Reads all of a base but its weights. Raises PreceptorError: see ``teacher.model.load_teacher``."""
    folder = Path(source)
    options = source_options(source, revision)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        try:
            generation = GenerationConfig.from_pretrained(source, **options)
        except OSError:  # few models have none
            generation = GenerationConfig.from_model_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise source_error(source, error) from error
    commit = folder_sha256(folder) if folder.is_dir() else str(config._commit_hash)
    return Language(tokenizer, source, commit, *ends_and_context(source, tokenizer, config, generation))


def source_options(source: str, revision: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told of where a base is. Raises what is wrong with a folder."""
    folder = Path(source)
    if folder.is_dir():
        _check_folder(folder)
        return {"trust_remote_code": False, "local_files_only": True}
    if folder.is_absolute() or source.startswith("."):
        raise PreceptorError("BAD_TEACHER_SOURCE", f"there is no folder {source}", file=source)
    return {"trust_remote_code": False, "revision": revision or "main"}


def source_error(source: str, error: Exception) -> PreceptorError:
    """What ``from_pretrained`` says, in our words."""
    away = isinstance(error, OSError) and not Path(source).is_dir()
    reason = "MODEL_UNREACHABLE" if away else "BAD_TEACHER_SOURCE"
    return PreceptorError(reason, f"{source} cannot be loaded: {error}", file=source)


def _check_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
            raise PreceptorError("UNSAFE_CHECKPOINT", f"{folder} has weights, but no *.safetensors", file=str(folder))
        raise PreceptorError("BAD_TEACHER_SOURCE", f"{folder} has no *.safetensors", file=str(folder))
    for needed in ("config.json", "tokenizer.json"):
        if needed not in names:
            raise PreceptorError("BAD_TEACHER_SOURCE", f"{folder} has no {needed}", file=str(folder))
