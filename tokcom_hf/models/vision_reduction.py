"""Stage 1 of a `PrunedVLM`: a prompt is embedded, and its images' tokens become fewer before the language model."""

import torch

from .token_removal import Stream
from .token_selection import STRATEGIES


class VisionReduction:
    """What a `PrunedVLM` does with a prompt before its first layer; mixed into it."""

    def prepare_prompt(self, input_ids, attention_mask=None, position_ids=None, labels=None, mode=None, **inputs):
        """Embeds a prompt and reduces its vision tokens.

        Returns:
            `(Stream, details)`; details holds the merger's outputs and the original number of vision tokens per row.

        Raises:
            ValueError: images and image placeholders do not match, or an input the family does not know.
        """
        mode = self._mode if mode is None else mode
        inputs = {name: value for name, value in inputs.items() if value is not None and name != "mm_token_type_ids"}
        unknown = [name for name in inputs if name not in self.adapter.image_inputs]
        if unknown:
            raise ValueError(
                f"PrunedVLM on {self.base.config.model_type!r} takes {', '.join(self.adapter.image_inputs)}, got "
                f"{', '.join(unknown)} (videos are not supported)."
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
        details: dict = {"counts": {"vision_tokens": vision.sum(-1), "text_tokens": (mask & ~vision).sum(-1)}}
        if not inputs:
            if vision.any():
                raise ValueError(f"The prompt has {int(vision.sum())} image placeholders but no image was given.")
            return stream, details
        return self._insert_images(stream, inputs, mode, details)

    def _insert_images(self, stream: Stream, inputs: dict, mode: str, details: dict):
        strategy = self.config.strategy if self.config.strategy in STRATEGIES else None
        reduces = mode != "origin" and (self.token_merger is not None or strategy is not None)
        guided = self.token_merger is not None and self.token_merger.config.attention_guided
        features, received = self.adapter.features(
            inputs, with_attention=reduces and (guided or strategy == "visionzip")
        )
        sizes = [len(f) for f in features]
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
            outputs = self._reduce(features, received, row_of_image, stream, strategy, details)
        else:
            outputs = [(f, torch.arange(len(f), device=rows.device)) for f in features]
        kept = torch.cat([index + start for (_, index), start in zip(outputs, starts)])
        embedded = self.adapter.project(torch.cat([values for values, _ in outputs]))
        stream.hidden = stream.hidden.index_put((rows[kept], columns[kept]), embedded.to(stream.hidden.dtype))
        keep = ~stream.vision
        keep[rows[kept], columns[kept]] = True
        return stream.keep(keep), details

    def _reduce(self, features, received, row_of_image, stream, strategy, details):
        """Per image `(features (m, d), index (m,))`."""
        if strategy is not None:
            for tokens in features:
                if self.config.keep > len(tokens):
                    raise ValueError(f"keep={self.config.keep} is more than the image's {len(tokens)} vision tokens.")
            attention = received or [None] * len(features)
            select = STRATEGIES[strategy]
            return [select(f, self.config.keep, a, self._generator) for f, a in zip(features, attention)]
        outputs: list = [None] * len(features)
        details["merge_weights"], sparsity = [], []
        for size in sorted({len(f) for f in features}):
            members = [i for i, f in enumerate(features) if len(f) == size]
            rows = row_of_image[members]
            result = self.token_merger(
                torch.stack([features[i] for i in members]),
                stream.hidden[rows],
                stream.question[rows],
                torch.stack([received[i] for i in members]) if received is not None else None,
                temperature=self.temperature,
            )
            for place, image in enumerate(members):
                used = result.keep_mask[place]
                outputs[image] = (result.merged_features[place][used], result.keep_index[place][used])
            details["merge_weights"].append(result.merge_weights)
            sparsity.append(result.sparsity_loss)
        details["merge_sparsity_loss"] = torch.stack(sparsity).mean()
        return outputs
