"""What norms see and what they cost: the half of T-15's record that speaks of activations, scales and times."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.records import Record

PRE_ATTENTION = "pre_attention"
#: a timing that exceeds that of a longer sequence by more than this share was disturbed
DISTURBED = 0.2


class NormActivations(Record):
    """Activations at norms [site, layer], learned scales [site, layer], and kernel times.

    Where a measured record has figures per token and published figures have pooled ones only, the property says which
    it takes; none mixes them.
    """

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return int(self.data.sizes["layer"])

    @cached_property
    def depth(self) -> np.ndarray:
        """Relative depth of each layer [layer]: layer / number of layers."""
        depth: np.ndarray = np.arange(self.n_layers) / self.n_layers
        return depth

    @cached_property
    def width(self) -> int:
        """Width of the residual stream d."""
        return int(self.provenance["settings"]["hidden_size"])

    @cached_property
    def sites(self) -> list[str]:
        """Roles of the norms inside a layer, in the order in which they run."""
        return [str(name) for name in self.data["site"].values]

    @property
    def has_output_norms(self) -> bool:
        """Whether the model norms the outputs of its sublayers, too."""
        return any(site.startswith("post_") for site in self.sites)

    def at(self, name: str, site: str = PRE_ATTENTION) -> xr.DataArray:
        """A variable [site, layer] at one site [layer]."""
        return self.mean(name).isel(site=self.sites.index(site), drop=True)

    # ---- the residual stream

    @cached_property
    def layer_output_std(self) -> xr.DataArray:
        """Standard deviation of all elements of a text after each layer [layer], as published."""
        return self.mean("layer_output_std")

    @cached_property
    def layer_output_token_rms(self) -> xr.DataArray:
        """Median root mean square of a token after each layer, the first token left out [layer]."""
        return self.mean("layer_output_token_rms")

    @cached_property
    def jumps(self) -> np.ndarray:
        """Pooled standard deviation after each layer over that before it [layer]; layer 0 has none (NaN)."""
        values = self.layer_output_std.values
        return np.concatenate([[np.nan], values[1:] / values[:-1]])

    @cached_property
    def jump_layer(self) -> int:
        """The layer whose output exceeds its input most, in pooled standard deviation; layer 0 left out.

        Layer 0 writes onto bare embeddings, which are small in any model.
        """
        return int(np.nanargmax(self.jumps))

    @cached_property
    def jump(self) -> float:
        """By which factor it does."""
        return float(self.jumps[self.jump_layer])

    @cached_property
    def token_jump(self) -> float:
        """The same of the median token's root mean square, the first token left out."""
        rms = self.layer_output_token_rms.values
        return float(rms[self.jump_layer] / rms[self.jump_layer - 1])

    @cached_property
    def first_token_excess(self) -> float:
        """Root mean square of the first token over that of the median one, after the jump layer."""
        first, others = self.mean("layer_output_first_token_rms").values, self.layer_output_token_rms.values
        return float(first[self.jump_layer] / others[self.jump_layer])

    def require_jump(self, least: float) -> None:
        """Raise NotApplicable unless the stream's pooled standard deviation jumps by a factor at one layer."""
        if self.jump < least:
            raise NotApplicable(f"the stream of {self.subject} grows by at most {self.jump:.1f} at one layer")

    @cached_property
    def plateau_variation(self) -> float:
        """Coefficient of variation of the pooled standard deviation at pre-attention norms after the jump layer."""
        after = self.at("norm_input_std").values[self.jump_layer + 1 :]
        return float(after.std() / after.mean())

    # ---- what norms make of it

    def pooled_compression(self, site: str = PRE_ATTENTION) -> xr.DataArray:
        """Pooled standard deviation at the norm's input over that at its output [layer], as published."""
        return self.at("norm_input_std", site) / self.at("norm_output_std", site)

    @cached_property
    def token_compression(self) -> xr.DataArray:
        """The same of the median token's channel standard deviation, the first token left out [layer]."""
        return self.at("norm_input_token_std") / self.at("norm_output_token_std")

    @cached_property
    def output_std(self) -> xr.DataArray:
        """Channel standard deviation of the median token at pre-attention outputs [layer]; published: pooled."""
        return self.at("norm_output_token_std" if self.has("norm_output_token_std") else "norm_output_std")

    @cached_property
    def peak_kurtosis(self) -> float:
        """Largest pooled excess kurtosis at a pre-attention norm's input."""
        return float(self.at("norm_input_excess_kurtosis").max())

    @cached_property
    def top_element_share(self) -> float:
        """Share of the power in one element, where the pooled kurtosis peaks.

        Of N elements one of which holds a share p of the power the kurtosis is N p^2; published figures give p so.
        """
        kurtosis = self.at("norm_input_excess_kurtosis")
        if self.has("top_element_power_share"):
            return float(self.at("top_element_power_share")[int(np.argmax(kurtosis.values))])
        elements = float(np.mean(self.provenance["settings"]["activation_tokens"])) * self.width
        return float(np.sqrt(self.peak_kurtosis / elements))

    @cached_property
    def token_kurtosis_at_peak(self) -> float:
        """Median excess kurtosis of a token's channels where the pooled kurtosis peaks, the first token left out."""
        peak = int(np.argmax(self.at("norm_input_excess_kurtosis").values))
        return float(self.at("norm_input_token_excess_kurtosis")[peak])

    # ---- means

    @cached_property
    def mean_to_std(self) -> xr.DataArray:
        """|channel mean| over channel standard deviation at pre-attention norms [layer].

        Mean of the ratio over tokens, the first left out; published: ratio of the averages over all tokens.
        """
        return self.at("mean_to_std") if self.has("mean_to_std") else self.mean("mean_to_std_ratio")

    @cached_property
    def mean_to_std_vs_chance(self) -> xr.DataArray:
        """The same over sqrt(2 / (pi d)), its expectation for independent entries of mean zero [layer]."""
        compared: xr.DataArray = self.mean_to_std * np.sqrt(np.pi * self.width / 2)
        return compared

    def growth(self, name: str) -> float:
        """A variable [layer] at the last layer over that at the first."""
        values = self.mean(name).values
        return float(values[-1] / values[0])

    @cached_property
    def largest_layer_norm_change(self) -> float:
        """Largest median change of a norm's output, if it centred too: |LN - RMS| / |RMS|, over norms of the block."""
        return max(map(self.layer_norm_change, [*self.sites, "final"]))

    def layer_norm_change(self, site: str) -> float:
        """The same over the norms of one site.

        Raises:
            NotApplicable: not measured.
        """
        if site == "final":
            return float(self.mean("final_layer_norm_output_change"))
        return float(self.at("layer_norm_output_change", site).max())

    # ---- learned scales

    def between_layer_share(self, site: str = PRE_ATTENTION) -> float:
        """Share of the variance of a site's learned scales that lies between the layers' means."""
        means, spreads = self.at("scale_mean", site).values, self.at("scale_std", site).values
        between = float(means.var())
        return between / (between + float((spreads**2).mean()))

    def scale_figure(self, name: str, site: str) -> float:
        """A figure over all layers and channels of a site, e.g. `scale_global_std`."""
        return float(self.mean(name).isel(site=self.sites.index(site)))

    # ---- times

    def latency_ratio(self, slower: str, faster: str) -> xr.DataArray:
        """Forward and backward time of one norm over that of another [hidden_size, sequence_length].

        NaN for shapes where any norm took longer than on longer sequences: something else ran then.

        Raises:
            NotApplicable: times were not taken.
        """
        times = self._times(slower, faster)
        longer = times.shift(sequence_length=-1)
        disturbed = (times > (1 + DISTURBED) * longer).any("norm_type")
        ratio: xr.DataArray = times.sel(norm_type=slower, drop=True) / times.sel(norm_type=faster, drop=True)
        return ratio.where(~disturbed)

    def _times(self, *norm_types: str) -> xr.DataArray:
        """Forward and backward time of all norms [norm_type, hidden_size, sequence_length], ms."""
        times = self.variable("total_latency")
        for norm_type in norm_types:
            if times.sel(norm_type=norm_type).isnull().all():
                raise NotApplicable(f"the {self.source} record of {self.subject} holds no times of {norm_type}")
        return times

    def raw_latency_ratio(self, slower: str, faster: str) -> xr.DataArray:
        """The same of all shapes, as published."""
        times = self._times(slower, faster)
        ratio: xr.DataArray = times.sel(norm_type=slower, drop=True) / times.sel(norm_type=faster, drop=True)
        return ratio
