"""Feature maps of the stages of an image model, read by forward hooks while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .models.stages import Stages, feature_map, find_module, find_stages, special_token_count


class StageTap:
    """Reads stages (by number) and modules (by name) of one model.

    Args:
        model (`nn.Module`): the student or the teacher.
        name (`str`): for error messages.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name
        self._stages: Stages | None = None
        self._special_tokens: int | None = None

    def find(self, inputs: Mapping) -> Stages:
        """The stages, found on first use by running the model on `inputs`.

        Raises:
            ValueError: for models that take no images, and where no stages are found.
        """
        if self._stages is None:
            self._stages = find_stages(self.model, lambda: self.model(**inputs), self.image_size(inputs))
        return self._stages

    def image_size(self, inputs: Mapping) -> tuple[int, int]:
        """Height and width of the images.

        Raises:
            ValueError: where there are none.
        """
        images = inputs.get("pixel_values")
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise ValueError(
                f"The {self.name} takes no images (pixel_values of shape (batch, channels, height, width)), so it has no feature maps. Use "
                "signal 'hidden_states' or 'pooled' for text models."
            )
        return tuple(images.shape[-2:])

    def check(self, wanted: Iterable[int | str]) -> None:
        """Raises `ValueError` for stages and modules that the model does not have."""
        for stage in wanted:
            if isinstance(stage, str):
                find_module(self.model, stage, self.name)
            elif not 0 <= stage < len(self._stages):
                raise ValueError(
                    f"The layer map names stage {stage} of the {self.name}, which has stages 0 to {len(self._stages) - 1} (the stem is not "
                    "a stage). Correct the layer map."
                )

    def open(self, wanted: Iterable[int | str], found: dict) -> list:
        """Hooks that put what the stages return into `found`; the caller removes them."""
        handles = []
        for stage in wanted:
            module = self._stages.modules[stage] if isinstance(stage, int) else find_module(self.model, stage, self.name)
            handles.append(module.register_forward_hook(lambda _m, _a, out, stage=stage: found.__setitem__(("features", stage), out)))
        return handles

    def maps(self, wanted: Iterable[int | str], found: Mapping, inputs: Mapping) -> dict[int | str, Tensor]:
        """What was found as maps `(batch, channels, height, width)`.

        Raises:
            ValueError: where a module was not run, or returned no map.
        """
        if self._special_tokens is None:
            self._special_tokens = special_token_count(self.model)
        maps, image_size = {}, self.image_size(inputs)
        for stage in wanted:
            output = found.get(("features", stage))
            maps[stage] = None if output is None else feature_map(output, image_size, self._special_tokens)
            if maps[stage] is None:
                what = "was not run" if output is None else "gave neither a map nor patch tokens that fit the image"
                raise ValueError(
                    f"The module {stage!r} of the {self.name} {what}, so there are no features (batch, channels, height, width). Name a "
                    "module that returns them, such as a stage or block, or use signal 'pooled'."
                )
        return maps
