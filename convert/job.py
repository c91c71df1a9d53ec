"""A checkpoint that was opened and found convertible: what can be wrong with it is found before a byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .added import found_in_texts
from .checkpoint import Checkpoint
from .models import YES_LOGIT, Architecture
from .recipe import find_recipe
from .reference import GEMMA_PARTS, PromptParts, ReferencePairs
from .samples import SAMPLES, Sample, samples_with
from .tensors import Tensor, find_architecture, plan
from .vocab import read_vocabulary
from .write import Metadata, model_metadata, write_file


@dataclass(frozen=True)
class Job:
    checkpoint: Checkpoint
    architecture: Architecture
    tensors: list[Tensor]
    metadata: Metadata
    pairs: ReferencePairs
    samples: tuple[Sample, ...] = SAMPLES  # what its files are checked with

    @staticmethod
    def open(
        directory: Path, source: str = "", revision: str = "", parts: PromptParts = GEMMA_PARTS
    ) -> Job:
        """source: recorded in the file, the directory's name by default. Raises ConvertError."""
        checkpoint = Checkpoint.open(directory)
        architecture = find_architecture(checkpoint)
        tensors, vocabulary = plan(checkpoint, architecture), read_vocabulary(checkpoint, architecture)
        source = source or directory.resolve().name
        is_asked = architecture.kind == YES_LOGIT and architecture.gguf != "gemma"
        recipe = find_recipe(checkpoint, source, vocabulary) if is_asked else None
        metadata = model_metadata(checkpoint, architecture, vocabulary, source, revision, parts, recipe)
        pairs = ReferencePairs(checkpoint, architecture, vocabulary, metadata["rerank.max_tokens"], parts, recipe)
        samples = samples_with(found_in_texts(vocabulary))
        return Job(checkpoint, architecture, tensors, metadata, pairs, samples)

    def write(self, path: Path, half: bool) -> None:
        """Writes an F16 (half) or F32 file. Raises ConvertError."""
        write_file(path, self.checkpoint, self.architecture, self.tensors, self.metadata, half)
