"""The model of an exported run as a `PyTorchModelHubMixin`: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import PyTorchModelHubMixin

from vaflow.errors import CorruptError, WeightsError, explain
from vaflow.train.heads import VAModel
from vaflow.train.run_folder import model_options
from vaflow.train.run_record import RunRecord

MAX_WIDTH = 2**16  # maximum width of a prototype; larger values are not text embeddings


class PretrainedModel(VAModel, PyTorchModelHubMixin, library_name="vaflow"):
    """`VAModel` from the `config.json` of an exported run, with `from_pretrained`, `save_pretrained`, `push_to_hub`.

        model = PretrainedModel.from_pretrained("DIR or USER/NAME")
        output = model(batch)  # vaflow.train.batch.Batch -> Output

    With `best = "each"` this is the best epoch of the mean CCC; `vaflow.load` also reads the best epochs per dimension.

    Args:
        config: content of `config.json`.

    Raises:
        CorruptError: `config` is not that of an exported run.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        try:
            record = RunRecord.from_document(config)
            prototypes, context = config.get("prototypes"), config.get("context")
            shapes = [shape for shape in (prototypes, context) if shape is not None]
            if any(len(shape) != 2 or not all(0 < int(size) <= MAX_WIDTH for size in shape) for shape in shapes):
                raise ValueError("prototypes and context must be two sizes each")
        except (ValueError, TypeError) as error:
            raise CorruptError(explain("config.json is not that of an exported run", got=error)) from error
        super().__init__(
            [stream.spec for stream in record.streams],
            None if prototypes is None else torch.zeros(*prototypes),
            context=None if context is None else (context[0], context[1]),
            targets=record.targets,
            **model_options(record.config),
        )

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load every tensor, regardless of `strict`: the hub's default leaves missing tensors random."""
        if not Path(model_file).is_file():
            raise WeightsError(explain(f"{Path(model_file).parent} is incomplete", expected="model.safetensors"))
        return super()._load_as_safetensor(model, model_file, map_location, True)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> NoReturn:
        problem = "The model has no safetensors file"
        raise WeightsError(explain(problem, expected="model.safetensors", got=Path(model_file).name))
