"""`LFQExpandedModel`: any language or vision-language model with 2^d visual tokens added to its vocabulary.

The base model stays the transformers class it is, with its tables untouched. New rows are parameters of their own; hooks
on the base model's embedding and head look them up and append their logits. So old rows cannot move through weight decay,
momentum or a gradient mask that is off by one: no optimizer ever holds them, and the logits of old ids come from the
same matrix product as before. Training computes the loss in chunks over both tables, never all logits.
"""

import os
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .configuration_lfq_expanded import LFQExpandedConfig
from .lfq_base_call import cache_keyword_of, keywords_of
from .lfq_files import auto_class_of, load_base, load_lfq_expanded, reference_of, save_lfq_expanded
from .lfq_generation import LFQModeLogitsProcessor
from .lfq_hooks import LFQHooks
from .lfq_rows import LFQRows, device_of, initialize_rows, text_host, vocabulary_of, weights_at_hand
from .lfq_tables import JoinedHead, OldHead, SplitTable, merge_rows
from .lfq_tokens import check_output_dim
from .shared_cache_name import one_cache
from .shared_strict_loading import StrictLoading, check_shapes
from .shared_tokenizer_size import tokenizer_size
from .shared_wrapped_base import check_generation_config, check_ids, computed_buffers_kept

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_lfq import LFQImageTextPipeline  # noqa: F401


class LFQExpandedModel(LFQHooks, StrictLoading, GenerationMixin):
    """A base model whose ids `[start, start + 2^output_dim)` are LFQ tokens.

    model = LFQExpandedModel.from_base(AutoModelForCausalLM.from_pretrained(name), output_dim=16)
    model(input_ids=ids, labels=ids).loss.backward()
    model.generate(**inputs, mode="image", num_image_tokens=256)
    model.merge_and_unload().save_pretrained("plain")     # loads with stock transformers
    """

    config: LFQExpandedConfig
    config_class = LFQExpandedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LFQExpandedConfig, base: PreTrainedModel | None = None, rows_in_float32: bool = False):
        super().__init__(config)
        if rows_in_float32:
            self._keep_in_fp32_modules_strict = ["lfq_rows"]
        if base is None:
            attention = config._attn_implementation
            options = {} if attention in (None, "sdpa") else {"attn_implementation": attention}
            base = config.base_class().from_config(
                config.make_base_config(), dtype=torch.get_default_dtype(), **options
            )
        else:
            # Its weights are there already: `post_init` must not draw them again.
            for module in base.modules():
                module._is_hf_initialized = True
        self.base = base
        embedding, head = vocabulary_of(base)
        old_rows, hidden_size = embedding.weight.shape
        if old_rows != config.lfq_start_token_id:
            raise ValueError(
                f"lfq_start_token_id={config.lfq_start_token_id}, but the base model's vocabulary table has {old_rows} "
                "rows: these LFQ tokens belong to another base model."
            )
        tied = head.weight is embedding.weight or bool(getattr(text_host(base).config, "tie_word_embeddings", False))
        bias = getattr(head, "bias", None) is not None
        self.lfq_rows = LFQRows(2**config.output_dim, hidden_size, tied=tied, bias=bias)
        self.joined_head = JoinedHead(self, head, head=True)
        if type(head) is nn.Linear:
            head.__class__ = OldHead
        embedding.register_forward_pre_hook(self._without_new_ids)
        embedding.register_forward_hook(self._with_new_rows)
        head.register_forward_pre_hook(self._catch_hidden)
        head.register_forward_hook(self._with_new_logits)
        self._keywords, self._cache_keyword = keywords_of(base), cache_keyword_of(base)
        # Whether the base's logits are what its head returns (no soft cap, no scale); seen at the first loss.
        self._plain_head: bool | None = None
        if getattr(base, "generation_config", None) is None:
            base.generation_config = GenerationConfig()
        if getattr(base, "hf_device_map", None):
            # What is offloaded has to be known where this model is saved, and where a trainer refuses it.
            self.hf_device_map = {f"base.{name}".rstrip("."): where for name, where in base.hf_device_map.items()}
        self.post_init()
        self.freeze_original_rows(config.freeze_original)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Rows on the meta device are about to be loaded.
        if isinstance(module, LFQRows) and not module.embedding.is_meta:
            embedding, head = vocabulary_of(self.base)
            c = self.config
            for rows, old in ((module.embedding, embedding), (module.head, head)):
                if rows is not None:
                    with weights_at_hand(old):
                        initialize_rows(rows, old.weight, c.embedding_init_method, c.embedding_init_std, c.output_dim)
            if module.bias is not None:
                # A new id starts with the bias of an average old one, so that it is neither favoured nor shut out.
                with weights_at_hand(head):
                    module.bias.fill_(float(head.bias.float().mean()))

    # ------------------------------------------------------------------ building, saving, loading
    @classmethod
    def from_base(
        cls,
        model,
        output_dim: int = 16,
        embedding_init_method: str = "random",
        freeze_original: bool = True,
        embedding_init_std: float = 0.02,
        tokenizer=None,
        **kwargs,
    ) -> "LFQExpandedModel":
        """Adds 2^output_dim tokens to a model.

        Args:
            model: a loaded causal or image-text-to-text model, or its Hub name or folder.
            output_dim: bits per code, 1 to 24.
            embedding_init_method: `random`, `zeros` or `mean`; see `LFQExpandedConfig`.
            freeze_original: the old vocabulary rows do not train.
            embedding_init_std: standard deviation of the new rows.
            tokenizer: the base model's; text generation then never emits a padding row of a padded vocabulary.
            kwargs: for loading, where `model` is a name (`dtype`, `device_map`, `trust_remote_code`, ...).

        Raises:
            ValueError: no output embeddings, an expanded model, a tokenizer with more ids than the model has rows, or
                an option out of range.
        """
        check_output_dim(output_dim)
        if isinstance(model, (str, os.PathLike)):
            model = load_base(model, **kwargs)
        elif kwargs:
            raise TypeError(f"{', '.join(kwargs)} can only be given together with the name of a model.")
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"LFQExpandedModel wraps a model of transformers, its Hub name or folder, got {type(model).__name__}."
            )
        known = getattr(model.config.get_text_config(), "lfq_output_dim", None)
        if isinstance(model, LFQExpandedModel) or known is not None:
            raise ValueError(
                "This model already has LFQ tokens"
                + (f" (output_dim={known}, merged into its tables)" if known is not None else "")
                + "; expand the base model it was made from."
            )
        embedding, _ = vocabulary_of(model)
        rows = len(embedding.weight)
        text = None if tokenizer is None else tokenizer_size(tokenizer)
        reference, revision = reference_of(model)
        config = LFQExpandedConfig(
            output_dim=output_dim,
            lfq_start_token_id=rows,
            text_vocab_size=text,
            embedding_init_method=embedding_init_method,
            embedding_init_std=embedding_init_std,
            freeze_original=freeze_original,
            base_config=model.config.to_dict(),
            base_auto_class=auto_class_of(model),
            base_model_name_or_path=reference,
            base_revision=revision,
        )
        expanded = cls(config, base=model)
        # New rows stay float32 over a bfloat16 base: at a small learning rate bfloat16 rounds most updates away.
        expanded.lfq_rows.to(device=device_of(embedding))
        return expanded.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the new rows, and the base model from the same folder or from where the configuration says.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            kwargs: as everywhere in transformers. `trust_remote_code` is about the named repository alone;
                `base_trust_remote_code=True` lets code of the base model's repository run.

        Raises:
            OSError: the folder or the base model cannot be found.
            TypeError: an unknown keyword.
            ValueError: the checkpoint does not fit its configuration or its base model, holds numbers that are not
                finite, or needs code that is not trusted.
        """
        return load_lfq_expanded(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # `load_lfq_expanded` names missing and unexpected weights.
        check_shapes(model, load_config, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(self, save_directory, include_base: bool | None = None, **kwargs):
        """Saves the new rows and a reference to the base model, or everything.

        Args:
            save_directory: folder.
            include_base: save the base model's weights too. None: where they may be trained (any of them has
                `requires_grad`), where they are not bit for bit what the base model's name or folder gives, or where
                none is known.

        Raises:
            ValueError: `include_base=False` for a base model that its name or folder does not give, or adapters that
                are not merged.
        """
        save_lfq_expanded(self, super().save_pretrained, save_directory, include_base, **kwargs)

    def merge_and_unload(self) -> PreTrainedModel:
        """The base model, of its own class, with old and new rows in one table; this wrapper is used up.

        The result is saved and loaded with stock transformers. Its text configuration records `lfq_output_dim` and
        `lfq_start_token_id`, which `get_lfq_token_range` reads.
        """
        return merge_rows(self)

    def _apply(self, *args, **kwargs):
        with computed_buffers_kept(self.base):
            return super()._apply(*args, **kwargs)

    # ------------------------------------------------------------------ what trains
    def freeze_original_rows(self, frozen: bool = True) -> None:
        """Freezes (or frees) the base model's vocabulary tables, at any time in training.

        A gradient that is there already is dropped: an optimizer skips a parameter without one, momentum and weight
        decay included.
        """
        self.config.freeze_original = frozen
        for module in vocabulary_of(self.base):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not frozen)
                if frozen:
                    parameter.grad = None

    def freeze_base(self, frozen: bool = True) -> None:
        """Freezes (or frees) the whole base model; the old rows stay frozen where `freeze_original` says so."""
        self.base.requires_grad_(not frozen)
        if frozen:
            for parameter in self.base.parameters():
                parameter.grad = None
        self.freeze_original_rows(frozen or self.config.freeze_original)

    def trainable_rows(self) -> dict[str, float]:
        """Vocabulary rows that train: `trainable`, `total` and `share` (0 to 1)."""
        old, end = self.config.lfq_token_range
        new = end - old if self.lfq_rows.embedding.requires_grad else 0
        trainable = new + (old if vocabulary_of(self.base)[0].weight.requires_grad else 0)
        return {"trainable": trainable, "total": end, "share": trainable / end}

    # ------------------------------------------------------------------ the vocabulary
    @property
    def generation_config(self) -> GenerationConfig:
        """The base model's, which generates; it is saved with this model."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        # transformers sets one of its own before there is a base model.
        if "base" in self._modules:
            self.base.generation_config = config

    @property
    def lfq_token_range(self) -> tuple[int, int]:
        """`(start, end)` of the LFQ ids, end exclusive."""
        return self.config.lfq_token_range

    @property
    def language_model(self) -> "LFQExpandedModel":
        """This model, which owns the vocabulary: `.config.vocab_size` and `.get_input_embeddings()` count all ids.

        So a model and the joint model around it (`equip_internvl`) are asked in the same words.
        """
        return self

    def get_input_embeddings(self) -> SplitTable:
        """Maps old and new ids to embeddings; `.weight` joins both tables (a copy), `.trainable_mask` says which train."""
        return SplitTable(self, vocabulary_of(self.base)[0], head=False)

    def get_output_embeddings(self) -> JoinedHead:
        """Maps hidden states to logits of old and new ids; `.weight` joins both tables (a copy)."""
        return self.joined_head

    def set_input_embeddings(self, value):
        raise ValueError(
            "The vocabulary of an LFQExpandedModel is split over two tables and cannot be replaced or resized; resize "
            "the base model before it is expanded, or call merge_and_unload() first."
        )

    set_output_embeddings = set_input_embeddings

    def resize_token_embeddings(self, *args, **kwargs):
        """Always raises: the new rows would have to move."""
        self.set_input_embeddings(None)

    def original_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., old rows)` of the base model's own ids for the head's input."""
        head = vocabulary_of(self.base)[1]
        return nn.functional.linear(hidden_states, head.weight, getattr(head, "bias", None))

    def enable_input_require_grads(self) -> None:
        self.base.enable_input_require_grads()

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.base.gradient_checkpointing_disable()

    # ------------------------------------------------------------------ forward and generation
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """The base model's forward over the larger vocabulary.

        The columns that processors make are named, so that `Trainer` keeps them.

        Args:
            input_ids: `(batch, length)`, old and new ids.
            cache, past_key_values: a KV cache, under the new name of transformers or the old one.
            labels: `(batch, length)` ids, -100 where there is nothing to predict; shifted here as transformers does.
            use_cache: return a KV cache. None: as the base model decides, but none beside a loss.
            logits_to_keep: logits of so many last positions, or of these positions; 0 for all.
            num_items_in_batch: divisor of the summed loss (given by Trainer under gradient accumulation).
            return_logits: compute logits beside the loss. None: only without labels, so that neither training nor
                evaluation of a loss ever holds `(batch, length, vocabulary)`.
            return_dict: False for a tuple.
            kwargs: anything else the base model takes.

        Returns:
            The base model's output; `.logits` `(batch, length, old + 2^output_dim)` or None.

        Raises:
            TypeError: a keyword that the base model does not take.
            ValueError: attentions from an implementation that has none, or `return_logits` and `logits_to_keep` where
                they mean nothing.
        """
        if input_ids is not None:
            check_ids(input_ids)
        inputs = kwargs | {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self._cache_keyword: one_cache(cache, past_key_values),
            "inputs_embeds": inputs_embeds,
            "token_type_ids": token_type_ids,
            "mm_token_type_ids": mm_token_type_ids,
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "image_sizes": image_sizes,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
            "use_cache": use_cache,
            "output_attentions": output_attentions or self.config.output_attentions or None,
            "output_hidden_states": output_hidden_states or self.config.output_hidden_states or None,
            "logits_to_keep": logits_to_keep,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        for name in inputs:
            if name not in self._keywords:
                raise TypeError(f"The forward of {type(self.base).__name__} takes no argument {name!r}.")
        if self.base.config.return_dict is False:
            inputs["return_dict"] = True
        if labels is None:
            if return_logits is False:
                raise ValueError("return_logits=False leaves nothing to compute without labels.")
            output = self.base(**inputs)
        else:
            output = self._forward_with_loss(inputs, labels, num_items_in_batch, bool(return_logits))
        if output_attentions and any(layer is None for layer in output.attentions or (None,)):
            raise ValueError(
                f"attn_implementation={self.base.config.get_text_config()._attn_implementation!r} gives no attentions; "
                "load the model with attn_implementation='eager'."
            )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _forward_with_loss(self, inputs: dict, labels, num_items_in_batch, return_logits: bool):
        keep = inputs.pop("logits_to_keep", None)
        if keep is not None and not return_logits:
            raise ValueError(
                "logits_to_keep beside labels needs return_logits=True: a loss is computed without logits."
            )
        if "use_cache" in self._keywords and self._cache_keyword not in inputs:
            inputs.setdefault("use_cache", False)
        narrow = not return_logits and self._plain_head is not False and self._tables_at_hand()
        output, call = self._run(inputs, narrow)
        if self._plain_head is None and narrow:
            self._plain_head = torch.equal(output.logits.float(), call.logits.float())
            if not self._plain_head:
                output, call = self._run(inputs, narrow=False)
        values = dict(output.items())
        values["loss"] = self._loss(output.logits, call, labels, num_items_in_batch)
        if not return_logits:
            del values["logits"]
        elif keep is not None:
            places = keep if isinstance(keep, torch.Tensor) else slice(-keep, None) if keep else slice(None)
            values["logits"] = output.logits[:, places]
        return type(output)(**values)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        mode: str | None = None,
        num_image_tokens: int = 256,
        logits_processor=None,
        **kwargs,
    ):
        """transformers' `generate` of the base model over the larger vocabulary.

        Args:
            inputs: prompt ids `(batch, length)`; or `input_ids=` and whatever else the base model's processor gives.
            mode: `text` (no LFQ ids), `image` (exactly `num_image_tokens` LFQ ids), `mixed` (text, and where an LFQ
                id appears, a whole image of `num_image_tokens`), or None for no restriction.
            num_image_tokens: LFQ tokens of one image, for the modes `image` and `mixed`.
            kwargs: generation options. With `guidance_scale` above 1 give `negative_prompt_ids` `(batch, length)`, the
                prompt without its caption, which training with caption drop has taught the model.

        Returns:
            What the base model's `generate` returns: ids `(batch, prompt + new)`.

        Raises:
            ValueError: options that would not act: an unknown one, or a length that is not that of the image.
        """
        processors = list(logits_processor or [])
        if mode is not None:
            start, _ = self.lfq_token_range
            text = self.config.text_vocab_size or start
            # First: what else warps or draws must see the ids that may be drawn.
            processors.insert(0, LFQModeLogitsProcessor(mode, self.lfq_token_range, text, num_image_tokens))
        if mode == "image":
            for name in ("max_new_tokens", "min_new_tokens", "max_length", "min_length"):
                if kwargs.get(name) not in (None, num_image_tokens):
                    raise ValueError(f"mode='image' generates {num_image_tokens=} tokens exactly; leave {name} out.")
            kwargs |= {"max_new_tokens": num_image_tokens, "min_new_tokens": num_image_tokens, "max_length": None}
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("inputs and input_ids are two names of one argument; give one of them.")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if kwargs.get("input_ids") is not None:
            check_ids(kwargs["input_ids"])
        check_generation_config(kwargs.get("generation_config"))
        # Remote code may leave generation to its language model, which sees no images: this model then generates itself.
        generate = self.base.generate if hasattr(self.base, "generate") else super().generate
        return generate(logits_processor=processors or None, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        owner = self.base if hasattr(self.base, "prepare_inputs_for_generation") else super()
        return owner.prepare_inputs_for_generation(*args, **kwargs)
