"""`LFQExpandedModel`: any language or vision-language model with 2^d visual tokens added to its vocabulary.

The base model keeps its transformers class and its tables. New rows are parameters of their own; hooks on the base model's
embedding and head look them up and append their logits. Frozen old rows therefore cannot move: no optimizer holds them, and
the logits of old ids come from the same matrix product as before.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .configuration_lfq_expanded import LFQExpandedConfig
from .lfq_base_call import cache_keyword_of, check_attentions, checked_keywords, keywords_of, named
from .lfq_building import config_around, given_or_loaded
from .lfq_files import load_lfq_expanded, save_lfq_expanded
from .lfq_freezing import freeze, freeze_tables, trainable_rows
from .lfq_generation import generation_options
from .lfq_hooks import VocabularyHooks
from .lfq_loss import forward_with_loss
from .lfq_rows import LFQRows, device_of, draw_rows, new_rows, vocabulary_of
from .lfq_tables import JoinedHead, OldHead, SplitTable, merge_rows
from .lfq_tokens import check_output_dim
from .shared_around_base import AroundBase
from .shared_cache_name import one_cache
from .shared_strict_loading import StrictLoading, check_shapes
from .shared_tensor_checks import check_ids

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_lfq import LFQImageTextPipeline  # noqa: F401


class LFQExpandedModel(AroundBase, StrictLoading, GenerationMixin):
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
    _supports_flex_attn = True

    def __init__(self, config: LFQExpandedConfig, base: PreTrainedModel | None = None, rows_in_float32: bool = False):
        super().__init__(config)
        if rows_in_float32:
            self._keep_in_fp32_modules_strict = ["lfq_rows"]
        base = self.set_base(base, config.base_class())
        self.lfq_rows = new_rows(base, config)
        embedding, head = vocabulary_of(base)
        self.joined_head = JoinedHead(self, head, head=True)
        if type(head) is nn.Linear:
            head.__class__ = OldHead  # type: ignore[assignment]  # the same parameters, no nn.Linear to libraries
        self.hooks = VocabularyHooks(self)
        self.hooks.register(embedding, head)
        self.keywords, self.cache_keyword = keywords_of(base), cache_keyword_of(base)
        # Whether the base's logits are what its head returns (no soft cap, no scale); None until the first loss.
        self.plain_head: bool | None = None
        if getattr(base, "hf_device_map", None):
            # Saving and trainers read from this map which modules are offloaded.
            self.hf_device_map = {f"base.{name}".rstrip("."): where for name, where in base.hf_device_map.items()}
        self.post_init()
        self.freeze_original_rows(config.freeze_original)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Rows on the meta device are left alone: they are loaded afterwards.
        if isinstance(module, LFQRows) and not module.embedding.is_meta:
            draw_rows(module, self.base, self.config)

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
            embedding_init_method, freeze_original, embedding_init_std: see `LFQExpandedConfig`.
            tokenizer: the base model's tokenizer, so that no padding row of a padded vocabulary is generated as text.
            kwargs: options of loading, where `model` is a name (`dtype`, `device_map`, `trust_remote_code`, ...).

        Raises:
            TypeError: `model` is no model of transformers, or is loaded already and there are options of loading.
            ValueError: the model has no output embeddings or is expanded already, the tokenizer has more ids than the
                model has rows, or an option is out of range.
        """
        check_output_dim(output_dim)
        base = given_or_loaded(model, kwargs)
        start = {"embedding_init_method": embedding_init_method, "embedding_init_std": embedding_init_std}
        config = config_around(base, tokenizer, output_dim=output_dim, freeze_original=freeze_original, **start)
        expanded = cls(config, base=base)
        # New rows stay float32 over a bfloat16 base: at a small learning rate bfloat16 rounds most updates away.
        expanded.lfq_rows.to(device=device_of(vocabulary_of(base)[0]))
        return expanded.train(base.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the new rows, and the base model from the same folder or from where the configuration says.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            kwargs: those of transformers. `trust_remote_code` concerns the named repository alone; with
                `base_trust_remote_code=True` the base model's repository may run code of its own.

        Raises:
            OSError: the folder or the base model cannot be found.
            TypeError: an unknown keyword.
            ValueError: weights do not fit or are not finite, or code is not trusted.
        """
        return load_lfq_expanded(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # `load_lfq_expanded` names missing and unexpected weights.
        check_shapes(model, load_config, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def save_pretrained(self, save_directory, include_base: bool | None = None, **kwargs):  # type: ignore[override]  # ours first
        """Saves the new rows and a reference to the base model, or everything.

        Args:
            save_directory: folder.
            include_base: save the base model's weights, too. None: save them if one of them has `requires_grad`, or if
                they are not bit for bit what the base model's name or folder gives.

        Raises:
            ValueError: `include_base=False` for a base model that no name or folder gives, or unmerged LoRA adapters.
        """
        save_lfq_expanded(self, super().save_pretrained, save_directory, include_base, **kwargs)

    def merge_and_unload(self) -> PreTrainedModel:
        """The base model with old and new rows in one table, for stock transformers; do not use this wrapper afterwards."""
        return merge_rows(self)

    # ------------------------------------------------------------------ what trains, the vocabulary
    def freeze_original_rows(self, frozen: bool = True) -> None:
        """Freezes (or unfreezes) the base model's vocabulary tables, at any time in training."""
        self.config.freeze_original = frozen
        freeze_tables(self.base, frozen)

    def freeze_base(self, frozen: bool = True) -> None:
        """Freezes (or unfreezes) the whole base model; old rows stay frozen where `config.freeze_original` is set."""
        freeze(self.base.parameters(), frozen)
        self.freeze_original_rows(frozen or self.config.freeze_original)

    def trainable_rows(self) -> dict[str, float]:
        """Vocabulary rows that train: `trainable`, `total` and `share` (0 to 1)."""
        return trainable_rows(self)

    @property
    def lfq_token_range(self) -> tuple[int, int]:
        """`(start, end)` of the LFQ ids, end exclusive."""
        return self.config.lfq_token_range

    @property
    def language_model(self) -> "LFQExpandedModel":
        """This model itself. `JointLFQModel` has the same property, so that the same code reads both."""
        return self

    def get_input_embeddings(self) -> SplitTable:
        """Maps old and new ids to embeddings; `.weight` joins both tables (a copy), `.trainable_mask` marks trained rows."""
        return SplitTable(self, vocabulary_of(self.base)[0], head=False)

    def get_output_embeddings(self) -> JoinedHead:
        """Maps hidden states to logits of old and new ids; `.weight` joins both tables (a copy)."""
        return self.joined_head

    def set_input_embeddings(self, *args, **kwargs):
        """Always raises ValueError; so do `set_output_embeddings` and `resize_token_embeddings`."""
        raise ValueError(
            "The vocabulary of an LFQExpandedModel is split over two tables and cannot be replaced or resized; resize "
            "the base model before it is expanded, or call merge_and_unload() first."
        )

    set_output_embeddings = resize_token_embeddings = set_input_embeddings

    def original_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., old rows)` of the base model's own ids for the head's input."""
        # Not a call of the module: its hooks would append the new ids.
        return vocabulary_of(self.base)[1].forward(hidden_states)

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

        Args:
            input_ids: `(batch, length)`, old and new ids.
            cache, past_key_values: a KV cache, under the present name of transformers or the former one.
            labels: `(batch, length)` ids, -100 where there is nothing to predict; shifted here as in transformers.
            use_cache: return a KV cache. None: without labels the base model decides; with labels there is no cache.
            logits_to_keep: compute the logits of this many last positions, or of these positions; 0 for all.
            num_items_in_batch: divisor of the summed loss, which Trainer gives under gradient accumulation.
            return_logits: also compute logits beside a loss. None: logits only without labels, so that no training step and
                no evaluation of a loss holds `(batch, length, vocabulary)`.
            kwargs: other keywords of the base model.

        Returns:
            The base model's output; `.logits` `(batch, length, old + 2^output_dim)` or None.

        Raises:
            TypeError: a keyword that the base model does not take.
            ValueError: the attention implementation gives no attentions, or a keyword cannot act here.
        """
        if input_ids is not None:
            check_ids(input_ids)
        text = (input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, mm_token_type_ids)
        images = (pixel_values, pixel_attention_mask, image_sizes, image_grid_thw)
        videos = (pixel_values_videos, video_grid_thw, second_per_grid_ts)
        inputs = kwargs | named(*text, *images, *videos, use_cache, logits_to_keep)
        inputs[self.cache_keyword] = one_cache(cache, past_key_values)
        inputs["output_attentions"] = output_attentions or self.config.output_attentions or None
        inputs["output_hidden_states"] = output_hidden_states or self.config.output_hidden_states or None
        inputs = checked_keywords(self, inputs)
        if labels is not None:
            output = forward_with_loss(self, inputs, labels, num_items_in_batch, bool(return_logits))
        elif return_logits is False:
            raise ValueError("return_logits=False leaves nothing to compute without labels.")
        else:
            output = self.base(**inputs)
        if output_attentions:
            check_attentions(self.base, output)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

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
            inputs: prompt ids `(batch, length)`; or `input_ids=` and the other tensors of the base model's processor.
            mode: `text` (no LFQ ids), `image` (exactly `num_image_tokens` LFQ ids), `mixed` (text and whole images of
                `num_image_tokens`), or None for no restriction.
            num_image_tokens: LFQ tokens of one image, for the modes `image` and `mixed`.
            logits_processor: further processors, which run after that of `mode`.
            kwargs: generation options. `guidance_scale` above 1 also needs `negative_prompt_ids` `(batch, length)`: the
                prompt without its caption.

        Returns:
            What the base model's `generate` returns: ids `(batch, prompt + new)`.

        Raises:
            ValueError: an option is unknown, or a length differs from the image's.
        """
        options = generation_options(self, inputs, mode, num_image_tokens, logits_processor, kwargs)
        # A base model of remote code may have no `generate`; this model then generates itself.
        generate = self.base.generate if hasattr(self.base, "generate") else super().generate
        return generate(**options)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        owner = self.base if hasattr(self.base, "prepare_inputs_for_generation") else super()
        return owner.prepare_inputs_for_generation(*args, **kwargs)
