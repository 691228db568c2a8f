"""Stage 1 of a `PrunedVLM`: a prompt is embedded, and its images' tokens become fewer before the language model."""

import zlib

import torch

from .pruning_strategies import STRATEGIES
from .pruning_stream import Prompt, Stream


class VisionReduction:
    """What a `PrunedVLM` does with a prompt before its first layer; mixed into it."""

    def prepare_prompt(
        self, input_ids, attention_mask=None, position_ids=None, labels=None, images=None, mode="hard"
    ) -> Prompt:
        """Embeds a prompt and reduces its vision tokens.

        Args:
            images: the processor's inputs for the images by name; None values count as absent.

        Raises:
            ValueError: images and image placeholders do not match, or an input the family does not know.
        """
        inputs = {name: value for name, value in (images or {}).items() if value is not None}
        unknown = [name for name in inputs if name not in self.adapter.image_inputs]
        if unknown:
            raise ValueError(
                f"PrunedVLM on {self.base.config.model_type!r} takes {', '.join(self.adapter.image_inputs)}, got "
                f"{', '.join(unknown)} (videos are not supported)."
            )
        for name, given in (("attention_mask", attention_mask), ("labels", labels)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(given.shape)}."
                )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vision = input_ids == self.adapter.image_token_id
        positions = self.adapter.positions(input_ids, mask, inputs) if position_ids is None else position_ids
        positions = positions.expand(*positions.shape[:-2], *input_ids.shape)
        mask = mask.bool()
        question = mask & ~vision
        if labels is not None:
            # Nothing from the first answer token on: the heads must not read what they help to predict.
            question &= (labels != -100).cumsum(-1) == 0
        stream = Stream(
            hidden=self.get_input_embeddings()(input_ids),
            mask=mask,
            positions=positions,
            vision=vision,
            question=question,
            index=torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids),
            images=torch.full_like(input_ids, -1),
        )
        counts = {"vision_tokens": vision.sum(-1), "text_tokens": (mask & ~vision).sum(-1)}
        counts |= {"image_tokens": [], "tower": ([], []), "projected": 0}
        prompt = Prompt(stream, mode, counts, merged={})
        if not inputs:
            if vision.any():
                raise ValueError(f"The prompt has {int(vision.sum())} image placeholders but no image was given.")
            return prompt
        self._insert_images(prompt, input_ids, inputs)
        return prompt

    def _insert_images(self, prompt: Prompt, input_ids, inputs: dict) -> None:
        stream, mode = prompt.stream, prompt.mode
        strategy = self.config.strategy if self.config.strategy in STRATEGIES else None
        reduces = mode != "origin" and (self.token_merger is not None or strategy is not None)
        guided = self.token_merger is not None and self.token_merger.config.attention_guided in (True, "tower")
        images = self.adapter.features(inputs, with_attention=reduces and (guided or strategy == "visionzip"))
        features, received = images.features, images.received
        sizes = [len(f) for f in features]
        prompt.counts |= {
            "image_tokens": sizes,
            "tower": (images.sequences, images.windows),
            "projected": images.projected,
        }
        if int(stream.vision.sum()) != sum(sizes):
            raise ValueError(
                f"The images give {sum(sizes)} vision tokens ({len(sizes)} images), but the prompt holds "
                f"{int(stream.vision.sum())} image placeholders: every image needs its '<image>' in the text, and every "
                "'<image>' its image. Use the model's processor."
            )
        rows, columns = stream.vision.nonzero(as_tuple=True)
        # Images are numbered within their row; flat place p belongs to image `owner[p]`.
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(rows.device)
        starts = torch.tensor([0, *sizes[:-1]], device=rows.device).cumsum(0)
        row_of_image = rows[starts]
        first_of_row = torch.searchsorted(row_of_image, row_of_image)
        stream.images[rows, columns] = (owner - first_of_row[owner]).to(stream.images.dtype)
        if reduces:
            outputs = self._reduce(features, received, row_of_image, prompt, input_ids, strategy)
        else:
            outputs = [(f, torch.arange(len(f), device=rows.device)) for f in features]
        kept = torch.cat([index + start for (_, index), start in zip(outputs, starts)])
        embedded = self.adapter.project(torch.cat([values for values, _ in outputs]))
        stream.hidden = stream.hidden.index_put((rows[kept], columns[kept]), embedded.to(stream.hidden.dtype))
        keep = ~stream.vision
        keep[rows[kept], columns[kept]] = True
        prompt.stream = stream.keep(keep)

    def _reduce(self, features, received, row_of_image, prompt: Prompt, input_ids, strategy):
        """Per image `(features (m, d), index (m,))`."""
        stream = prompt.stream
        if strategy is not None:
            attention = received or [None] * len(features)
            select, rows = STRATEGIES[strategy], row_of_image.tolist()
            generators: list = [None] * len(features)
            if strategy == "random":
                questions = [ids[asked].tolist() for ids, asked in zip(input_ids, stream.question)]
                generators = [self._generator(questions[row], i - rows.index(row)) for i, row in enumerate(rows)]
            return [select(f, min(self.config.keep, len(f)), a, g) for f, a, g in zip(features, attention, generators)]
        outputs: list = [None] * len(features)
        results = []
        for size in sorted({len(f) for f in features}):
            members = [i for i, f in enumerate(features) if len(f) == size]
            rows = row_of_image[members]
            result = self.token_merger(
                torch.stack([features[i] for i in members]),
                stream.hidden[rows],
                stream.question[rows],
                torch.stack([received[i] for i in members]) if received is not None else None,
                temperature=self.temperature,
                return_dict=True,
            )
            for place, image in enumerate(members):
                used = result.keep_mask[place]
                outputs[image] = (result.merged_features[place][used], result.keep_index[place][used])
            results.append(result)
        kept = torch.cat([result.kept_tokens for result in results]).mean()
        sparsity = torch.stack([result.sparsity_loss for result in results]).mean()
        if self.token_merger.config.max_ratio is not None:
            # The budget holds the mean over all images, where each has a size of its own, too.
            budgets = [self.token_merger.config.tokens_wanted(len(f)) for f in features]
            sparsity = (kept - sum(budgets) / len(budgets)).square()
        prompt.merged = {
            "merge_weights": tuple(result.merge_weights for result in results),
            "merge_sparsity_loss": sparsity,
            "merge_entropy_loss": torch.stack([result.entropy_loss for result in results]).mean(),
            "merge_kept_tokens": kept,
        }
        return outputs

    def _generator(self, question: list[int], image: int) -> torch.Generator:
        """Of the `random` strategy: the same for a question's image whatever else is in the batch or runs beside it."""
        text = f"{self.config.strategy_seed} {question} {image}"
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))
