"""Every part of the model takes part in every training step, also where a batch has no image.

Processes that train together must gather and reduce the same parameters in the same order. A process whose batch is
text only would leave out the vision encoder, the compressor, the projector and the embedded query module: the others
would wait for it forever, or add their gradients to the wrong ones.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.modeling_flashsloth import FlashSlothModel
from ..model.positions import complete_positions


def add_blank_images(model: nn.Module) -> RemovableHandle:
    """From now on, a batch without images runs one blank image through the parts an image would pass.

    The blank image stands nowhere in the text and no query sees it: the model computes the same numbers as without it,
    and what the parts would learn from it is exactly zero. All processes run the same modules in the same order.

    Args:
        model: a FlashSloth model, or a wrapper (adapters) that holds one, after it has been sharded: the hooks that
            gather its parameters must come first.
    """
    owner = next(module for module in model.modules() if isinstance(module, FlashSlothModel))

    def add_blank_image(
        module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        has_images = inputs.get("pixel_values") is not None or inputs.get("image_features") is not None
        if has_images or not module.training or inputs.get("input_ids") is None:
            return None
        return args, {**inputs, **_blank_image(owner, inputs)}

    return owner.register_forward_pre_hook(add_blank_image, with_kwargs=True)


class EveryPartTakesPart(TrainerCallback):
    """`add_blank_images` while a Trainer trains."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None, "the Trainer passes its model"
        self._handle = add_blank_images(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.remove()


def _blank_image(owner: FlashSlothModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Model inputs that replace those of a text-only batch; (B, T) ids become (B, T, D) embeddings."""
    ids_BT, config = inputs["input_ids"], owner.config
    # embeddings go in place of ids, with which the model insists that every image has a placeholder; so check first
    embeddings = owner.get_input_embeddings()
    _, query_positions_BG = complete_positions(
        config, embeddings, 0, None, None, inputs.get("query_positions"), 0, ids_BT
    )
    shape = (1, config.num_views, config.vision_config.num_channels, config.image_height, config.image_width)
    return {
        "image_features": owner.get_image_features(torch.zeros(shape, device=ids_BT.device)),
        "input_ids": None,
        "inputs_embeds": embeddings(ids_BT),
        "image_positions": torch.full((ids_BT.shape[0], 1), -1, dtype=torch.long, device=ids_BT.device),
        "query_positions": query_positions_BG,
    }
