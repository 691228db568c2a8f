"""How a `TokComModel` samples one block of chunks behind finished ones: along the flow, or token after token."""

import torch
from torch import nn

from .flow_matching import commit_places, lagged_times, sample
from .modeling_tokcom_denoiser import DenoisedModelOutput, Modulations


class BlockSampling:
    """Mixed into `TokComModel` by `TokComGeneration`."""

    def _read(
        self, x, token_hidden, temperature: float, generator: torch.Generator | None, head: torch.Tensor | None
    ) -> torch.LongTensor:
        """The flow's end (batch, chunks, latent) → ids: from the denoiser's own token distributions where it has them."""
        if token_hidden is None:
            return self.decode(self.unstandardize(x), temperature, generator)
        return self.vae.read_tokens(token_hidden.flatten(1, 2), head, temperature, generator)

    def _flow(
        self, x, times, sampler, prefix=None, past=None, mask=None, guidance_scale=1.0, final_clean_pass=False,
        generator=None, lag=0.0, temperature=0.0, **options,
    ) -> tuple[torch.Tensor, torch.LongTensor]:  # fmt: skip
        """Runs the sampler on x (batch, chunks, latent), given clean latents to its left or their cached keys and values.

        options: further arguments of `forward`; `known`, a dict, keeps what the denoiser is told of each t from one block to
            the next.

        Returns:
            The clean latents, and their ids (batch, chunks · chunk_size).
        """
        chunk, options = self.config.vae.chunk_size, options | {"return_dict": True}
        known: dict[float, Modulations] = options.pop("known", {})
        if lag:
            times = list(self.per_entry(lagged_times(times, chunk, lag)).to(x.device)[:, None, None])
        memory: dict[str, torch.Tensor | None] = {"given": None, "free": None}
        last: list[torch.Tensor | None] = [None]

        def predict(x_t, t, key, prefix, past) -> DenoisedModelOutput:
            start = 0 if prefix is None else prefix.shape[1]
            padding = (
                None
                if mask is None or prefix is None
                else nn.functional.pad(mask, (0, start - mask.shape[1] + x_t.shape[1]), value=1)
            )
            condition = memory[key] if self.config.denoiser.self_conditioning else None
            if torch.is_tensor(t):
                per_token = t.view(chunk, -1)[:, 0].expand(1, x_t.shape[1], -1)
                if past is None and start:
                    per_token = nn.functional.pad(per_token, (0, 0, start, 0), value=1.0)
                extra, t = options | {"token_times": per_token}, float(t.mean())
            else:
                extra = options
            time = torch.full((1,), t, device=x_t.device)
            if past is not None or prefix is None:
                if t not in known:
                    known[t] = self.denoiser.modulation(time)
                extra = extra | {"modulations": known[t]}
            if past is not None:
                output = self(
                    x_t, time, self_condition=condition, attention_mask=padding, past_key_values=past,
                    position_offset=start, previous=prefix[:, -1:], **extra,
                )  # fmt: skip
            elif prefix is None:
                output = self(x_t, time, self_condition=condition, **extra)
            else:
                if self.config.clean_prefix:
                    time = torch.full((len(x_t), start + x_t.shape[1]), t, device=x_t.device)
                    time[:, :start] = 1.0
                if condition is not None:
                    condition = torch.cat([prefix, condition], dim=1)
                elif self.config.denoiser.self_conditioning:
                    condition = torch.cat([prefix, torch.zeros_like(x_t)], dim=1)
                whole = torch.cat([prefix, x_t], dim=1)
                output = self(whole, time, self_condition=condition, attention_mask=padding, **extra)
                if output.clean_latents is not None:
                    output.clean_latents = output.clean_latents[:, start:]
                if output.token_hidden is not None:
                    output.token_hidden = output.token_hidden[:, start:]
            memory[key] = output.clean_latents
            return output

        def denoise(x_t, t):
            given = predict(x_t, t, "given", prefix, past)
            last[0] = given.token_hidden
            if guidance_scale == 1.0 or prefix is None:
                return given.clean_latents
            free = predict(x_t, t, "free", None, None)
            if given.token_hidden is not None:
                last[0] = free.token_hidden + guidance_scale * (given.token_hidden - free.token_hidden)
            if free.clean_latents is None:
                return None
            return free.clean_latents + guidance_scale * (given.clean_latents - free.clean_latents)

        if sampler == "commit":
            options["only_tokens"] = True
            return self._commit(denoise, last, x, len(times) - 1, generator, options)
        x = sample(denoise, x, times, sampler, self.config.noise_std, generator)
        if final_clean_pass:
            x = denoise(x, 1.0)
        return x, self._read(x, last[0], temperature, generator, options.get("token_head"))

    def _commit(self, denoise, last, x, num_steps: int, generator, options) -> tuple[torch.Tensor, torch.LongTensor]:
        """Draws token after token of the chunks x (batch, chunks, latent): those drawn are at t = 1, the others at t = 0."""
        places, head = self.config.vae.chunk_size, self.vae.lm_head.weight
        size = x.shape[-1] // places
        # The token head is `lm_head`, the standardised latents of all tokens and their squares side by side. At t = 0 a
        # token's own latent tells nothing of it: the factors of the last two are zero.
        table = options["token_head"][:, -size - 1 : -1]
        times, tokens = torch.zeros(places, device=x.device), x.unflatten(-1, (places, -1)).clone()
        drawn = []
        for now in commit_places(places, num_steps):
            options["token_mask"] = torch.zeros(tokens.shape[:-1], dtype=torch.bool, device=x.device)
            options["token_mask"][:, :, now] = True
            denoise(tokens.flatten(-2), self.per_entry(times).view(1, 1, -1))
            hidden = last[0][:, : head.shape[1]].view(len(x), -1, head.shape[1])
            ids = self.vae.read_tokens(hidden, head, options["posterior_temperature"], generator)
            drawn.append(ids.unflatten(1, (-1, len(now))))
            tokens[:, :, now] = nn.functional.embedding(drawn[-1], table).to(tokens.dtype)
            times[now] = 1.0
        return tokens.flatten(-2), torch.cat(drawn, dim=-1).flatten(1)
