"""`PrunedVLM`: any supported vision-language model with fewer vision tokens.

Stage 1 works before the language model: a `TokenMerger` or a training-free strategy reduces the tokens of each image.
Stage 2 works inside it: before chosen layers a `LayerPruner` (or FastV) selects vision tokens. In `hard` mode the others are
removed from hidden states, masks and KV cache, and the selected ones keep their rotary positions.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, PreTrainedModel

from .configuration_pruned_vlm import PrunedVLMConfig, checked_mode
from .configuration_pruning_layer_pruner import LayerPrunerConfig
from .configuration_pruning_token_merger import TokenMergerConfig
from .modeling_pruning_layer_pruner import LayerPruner
from .modeling_pruning_token_merger import TokenMerger
from .pruning_building import STRATEGY_OPTIONS, config_around, given_or_loaded
from .pruning_checks import check_cached_turn, check_call, check_generation, check_stages
from .pruning_decoder import decode, run_prompt
from .pruning_families import family_of
from .pruning_files import load_pruned_vlm, save_pruned_vlm
from .pruning_output import PrunedVLMOutput
from .pruning_prompt import image_inputs, prepare_prompt
from .pruning_report import LastPrompt, token_report
from .pruning_stream import PrunedCache, cache_for
from .shared_around_base import AroundBase
from .shared_cache_name import CACHE, one_cache

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_pruned_vlm import PrunedImageTextToTextPipeline  # noqa: F401


class PrunedVLM(AroundBase, GenerationMixin):
    """A VLM with pruning stages and a pruning mode; "the heads" are its learned stages, `token_merger` and `layer_pruner`.

    model = PrunedVLM.from_base("llava-hf/llava-1.5-7b-hf", strategy="divprune", keep=64)
    model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    model.token_report()                                # tokens per layer, FLOPs, KV memory
    """

    config: PrunedVLMConfig
    config_class = PrunedVLMConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    accepts_loss_kwargs = False
    # At small learning rates bfloat16 weights would round most updates away.
    _keep_in_fp32_modules_strict = ["token_merger", "layer_pruner"]

    def __init__(self, config: PrunedVLMConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        base = self.set_base(base, AutoModelForImageTextToText)
        self.family = family_of(base)
        self.token_merger: TokenMerger | None = None
        self.layer_pruner: LayerPruner | None = None
        if config.token_merger is not None:
            self.token_merger = TokenMerger(TokenMergerConfig(**config.token_merger))
        if config.layer_pruner is not None:
            self.layer_pruner = LayerPruner(LayerPrunerConfig(**config.layer_pruner))
        check_stages(self)
        self.temperature = 0.1  # of soft masks and Gumbel noise, > 0; training anneals it
        self.last_prompt = LastPrompt()
        self.post_init()

    # ------------------------------------------------------------------ building, saving, loading
    @classmethod
    def from_base(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        token_merger: TokenMerger | TokenMergerConfig | None = None,
        layer_pruner: LayerPruner | LayerPrunerConfig | None = None,
        strategy: str | None = None,
        keep: int | None = None,
        *,
        pruning_mode: str = "hard",
        **options,
    ) -> "PrunedVLM":
        """Wraps a VLM.

        Args:
            model: a loaded VLM, or a Hub name or folder.
            token_merger, layer_pruner: the learned stages, as modules, or as configurations for fresh float32 weights.
            strategy, keep: a training-free strategy and the tokens it leaves per image.
            pruning_mode: see `PrunedVLMConfig`.
            options: `strategy_layer`, `strategy_seed`; where `model` is a name, also options of `from_pretrained`.

        Raises:
            TypeError: a keyword is unknown, or the model is loaded already and there are options of loading.
            ValueError: the family of the VLM is not supported, or stages do not fit the VLM.
        """
        settings = {name: options[name] for name in STRATEGY_OPTIONS if name in options}
        loading = {name: value for name, value in options.items() if name not in settings}
        base = given_or_loaded(model, loading)
        settings |= {"strategy": strategy, "keep": keep, "pruning_mode": pruning_mode}
        config = config_around(base, loading.get("revision"), token_merger, layer_pruner, **settings)
        pruned = cls(config, base=base)
        for name, part in (("token_merger", token_merger), ("layer_pruner", layer_pruner)):
            if isinstance(part, PreTrainedModel):
                setattr(pruned, name, part)
            elif part is not None:
                getattr(pruned, name).to(device=pruned.head_device, dtype=torch.float32)
        return pruned.train(base.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the heads, and the base model from where the configuration says.

        Keywords are those of transformers, which act on the base, and fields of `PrunedVLMConfig` such as `pruning_mode`.
        Without `dtype` the base has the precision in which it was saved; the heads always have theirs.
        """
        return load_pruned_vlm(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, include_base: bool | None = None, **kwargs):  # type: ignore[override]  # ours first
        """Saves the heads with a reference to the base, or everything.

        Args:
            save_directory: folder.
            include_base: True: save the base, too, in the subfolder `base`. None: save its weights in the folder's own files
                if its reference does not give them (trained, merged, cast, resized, built in memory). False: never.

        Raises:
            ValueError: `include_base=False` would lose weights.
        """
        save_pruned_vlm(self, super().save_pretrained, save_directory, include_base, **kwargs)

    # ------------------------------------------------------------------ small properties
    @property
    def pruning_mode(self) -> str:
        """`origin`, `merge_only`, `soft` or `hard`."""
        return self.config.pruning_mode

    @pruning_mode.setter
    def pruning_mode(self, mode: str) -> None:
        self.config.pruning_mode = checked_mode(mode)

    def resize_token_embeddings(self, *args, **kwargs):
        """Resizes the base model's input embeddings and head; arguments as in transformers."""
        table = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base_config = self.base.config.to_dict()
        return table

    @property
    def device(self) -> torch.device:
        """The device for inputs, `head_device`; the first weight of an offloaded model may be on another one."""
        return self.head_device

    @property
    def head_device(self) -> torch.device:
        """The device of the heads and of the prompt, on which the base embeds its tokens."""
        table: Any = self.base.get_input_embeddings()
        device = getattr(getattr(table, "_hf_hook", None), "execution_device", None)
        return table.weight.device if device is None else torch.device(device)

    def token_report(self) -> dict:
        """Tokens per layer, FLOPs and KV memory of this thread's last prompt; see `pruning_report.token_report`.

        Raises:
            ValueError: this thread has run no prompt yet.
        """
        if self.last_prompt.record is None:
            raise ValueError("token_report() describes the last prompt; run the model or generate first.")
        return token_report(self, self.last_prompt.record)

    @property
    def image_tokens(self) -> list[int]:
        """Unpruned vision tokens of every image in this thread's last prompt."""
        return [] if self.last_prompt.record is None else self.last_prompt.record.image_tokens

    # ------------------------------------------------------------------ the decoder
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: PrunedCache | None = None,
        past_key_values: PrunedCache | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pruning_mode: str | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> PrunedVLMOutput | tuple:
        """Runs a prompt, or new text behind the prompt that `cache` holds.

        Args:
            input_ids: `(batch, length)`, image placeholders included.
            attention_mask: `(batch, length)`, padding on either side; with a filled cache its last columns are read.
            position_ids: rotary positions, `(batch, length)` or `(3, batch, length)`, instead of the family's own.
            cache, past_key_values: a `PrunedCache`, under transformers' present or former name; an empty one is filled.
            use_cache: fill a new cache, where none is given.
            labels: `(batch, length)`, -100 where nothing is predicted. The heads read only the text before the first label.
            pixel_values, image_sizes, image_grid_thw, batch_num_images: tensors of the family's processor.
            mm_token_type_ids: taken because processors give it, and not read: `input_ids` shows the placeholders.
            logits_to_keep: compute the logits of this many last positions, or of these positions; 0 for all.
            pruning_mode: for this call, instead of the model's own.

        Raises:
            ValueError: images or another mode for a cached turn, videos, attentions, or images that do not fit the text.
        """
        check_call(self.config, input_ids, output_attentions)
        images = image_inputs(
            pixel_values, image_sizes, image_grid_thw, batch_num_images, pixel_values_videos, video_grid_thw
        )
        cache = cache_for(one_cache(cache, past_key_values), use_cache)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list | None = [] if wants_states else None
        if cache is not None and cache.segments:
            check_cached_turn(cache, images, pruning_mode, use_cache)
            hidden, pruning = decode(self, input_ids, cache, attention_mask, position_ids, states)
        else:
            mode = self.pruning_mode if pruning_mode is None else checked_mode(pruning_mode)
            prompt = None if cache is None else cache.take_prompt(len(input_ids))
            prompt = prompt or prepare_prompt(self, input_ids, attention_mask, position_ids, labels, images, mode)
            hidden, pruning = run_prompt(self, prompt, cache, states, input_ids.shape[1])
        logits, loss = self._logits_and_loss(hidden, logits_to_keep, labels)
        output = PrunedVLMOutput(loss, logits, cache, hidden_states=states and tuple(states), **pruning)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _logits_and_loss(self, hidden, logits_to_keep, labels) -> tuple[torch.Tensor, torch.Tensor | None]:
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.base.lm_head(hidden[:, places if isinstance(logits_to_keep, int) else logits_to_keep])
        size = logits.shape[-1]
        loss = None if labels is None else self.base.loss_function(logits=logits, labels=labels, vocab_size=size)
        return logits, loss

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        pruning_mode: str | None = None,
        **options,
    ):
        """Generates text after the reduced prompt, as `GenerationMixin.generate` does.

        Args:
            inputs, input_ids, …, mm_token_type_ids: prompt ids under either name and the processor's other tensors.
            pruning_mode: for this call, instead of the model's own.
            options: generation options, logits processors, a streamer and the like.

        Returns:
            Ids `(batch, length + new)`; with `return_dict_in_generate=True` an output that also has `token_report`.

        Raises:
            ValueError: an option could not act: `use_cache=False`, a cache or a cache implementation, `labels`,
                `output_attentions`, videos, or an unknown name.
        """
        if input_ids is not None and inputs is not None:
            raise ValueError("inputs and input_ids are two names of one argument; give one of them.")
        input_ids = inputs if input_ids is None else input_ids
        check_generation(self, input_ids, generation_config, options)
        mode = self.pruning_mode if pruning_mode is None else checked_mode(pruning_mode)
        images = image_inputs(pixel_values, image_sizes, image_grid_thw, batch_num_images)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = PrunedCache()
        cache.prompt = prepare_prompt(self, input_ids, mask, position_ids, None, images, mode)
        output = super().generate(
            input_ids=input_ids, attention_mask=mask, generation_config=generation_config, **{CACHE: cache}, **options
        )
        # Set again, because classifier-free guidance runs further prompts in between.
        self.last_prompt.record = cache.record
        if not torch.is_tensor(output):
            output["token_report"] = token_report(self, cache.record)
        return output

    def prepare_inputs_for_generation(
        self, input_ids, cache=None, attention_mask=None, past_key_values=None, output_hidden_states=None, **kwargs
    ):
        cache = one_cache(cache, past_key_values)
        if cache is not None and cache.segments:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": True,
            "logits_to_keep": 1,
            "output_hidden_states": output_hidden_states,
        }
