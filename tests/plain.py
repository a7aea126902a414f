"""ReDimNet in its plain layout, written from the paper's description: what `redimnet.py` is compared with.

Maps are (B, C, F, T) in memory too, mixtures are stacked, attention is two products. It reads the
parameters of a model by their released names and shares no code with it. It computes on a list of
batches, whose lengths may differ: no frame is padding, and BatchNorm sees the frames of all.
"""

import torch
import torch.nn.functional as F


class PlainReDimNet:
    """``PlainReDimNet(model)(feats)``: embeddings of features (B, F, T), or of a list of such batches.

    Its parameters are the model's own, so that gradients of both can be compared. In training
    BatchNorm leaves what the running statistics would become in ``running``.
    """

    def __init__(self, model, training=False, dtype=torch.float32):
        self.config = model.model_config
        self.state = {key: x.to(dtype) for key, x in model.state_dict(keep_vars=True).items()}
        self.training, self.running = training, {}

    def __call__(self, feats):
        batches = feats if isinstance(feats, list) else [feats]
        maps = [[x.unsqueeze(1) for x in batches]]
        maps = [self._to_1d(self._norm("backbone.stem.1", self._conv("backbone.stem.0", maps[0])))]
        f, c = self.config["F"], self.config["C"]
        for i, (stride, n_blocks, expansion, _, reduction) in enumerate(
            self.config["stages_setup"]
        ):
            name = f"backbone.stage{i}"
            x = self._mix(f"{name}.0", maps)
            x = [one.unflatten(1, (f, c)).transpose(1, 2).contiguous() for one in x]
            x = self._conv(f"{name}.2", x, stride=(stride, 1))
            f, c, number = f // stride, c * stride, 3
            for _ in range(n_blocks):
                x = self._block_2d(f"{name}.{number}.conv_block", x)
                number += 1
            if expansion != 1:
                x = self._conv(f"{name}.{number}.0", x)
                x = self._each(F.gelu, self._batch_norm(f"{name}.{number}.1", x, eps=1e-6))
                x = self._conv(f"{name}.{number}.3", x)
                number += 1
            x = self._to_1d(x)
            if reduction is not None:
                x = self._time_context(f"{name}.{number + 1}", x)
            maps.append(x)
        x = self._mix("backbone.fin_wght1d", maps)
        if self.config["out_channels"] is not None:
            x = self._batch_norm("backbone.mfa.1", self._conv("backbone.mfa.0", x))
        pooled = self._batch_norm("bn", [torch.cat([self._pool(one) for one in x])])
        embeddings = self._linear("linear", pooled)
        if self.config["emb_bn"]:
            embeddings = self._batch_norm("bn2", embeddings)
        return embeddings[0]

    # Layers, each on a list

    @staticmethod
    def _each(function, xs):
        return [function(x) for x in xs]

    def _linear(self, name, xs):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return [F.linear(x, weight, bias) for x in xs]

    def _conv(self, name, xs, stride=None):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        conv = F.conv1d if weight.ndim == 3 else F.conv2d
        groups = xs[0].shape[1] // weight.shape[1]
        if stride is not None:
            return [conv(x, weight, bias, stride=stride) for x in xs]
        return [conv(x, weight, bias, padding="same", groups=groups) for x in xs]

    def _norm(self, name, xs):
        """LayerNorm over channels, the second dimension."""

        def norm(x):
            centred = x - x.mean(dim=1, keepdim=True)
            x = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            shape = (-1,) + (1,) * (x.ndim - 2)
            return x * weight.view(shape) + bias.view(shape)

        return self._each(norm, xs)

    def _batch_norm(self, name, xs, eps=1e-5):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        mean, variance = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            if len(xs) == 1:  # as fast as torch's own
                running = mean.clone(), variance.clone()
                out = [F.batch_norm(xs[0], *running, weight, bias, training=True, eps=eps)]
                self.running[name] = running
                return out
            values = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], dim=1)
            self.running[name] = (
                0.9 * mean + 0.1 * values.mean(dim=1).detach(),
                0.9 * variance + 0.1 * values.var(dim=1).detach(),
            )
            mean, variance = values.mean(dim=1), values.var(dim=1, correction=0)
            scale = weight / (variance + eps).sqrt()
            shape = (-1,) + (1,) * (xs[0].ndim - 2)
            return [x * scale.view(shape) + (bias - mean * scale).view(shape) for x in xs]
        return [F.batch_norm(x, mean, variance, weight, bias, eps=eps) for x in xs]

    def _to_1d(self, xs):
        return [x.transpose(1, 2).flatten(1, 2) for x in xs]

    def _mix(self, name, maps):
        weights = self.state[f"{name}.w"].softmax(dim=1)  # (1, maps, C·F, 1)
        return [(torch.stack(xs, dim=1) * weights).sum(dim=1) for xs in zip(*maps)]

    def _block_2d(self, name, xs):
        kind = self.config["block_2d_type"]
        if kind.startswith("convnext_like"):
            return self._convnext(name, xs, F.relu if kind.endswith("relu") else F.gelu)
        pointwise = self.config["group_divisor"] is not None
        out = xs
        for i in (1, 2):
            out = self._conv(f"{name}.conv{i}", out)
            if pointwise:
                out = self._conv(f"{name}.conv{i}pw", out)
            if i == 1:
                out = self._each(F.relu, out)
            out = self._batch_norm(f"{name}.bn{i}", out)
        if kind.endswith("fwse"):
            pooled = [x.mean(dim=(1, 3)) for x in out]
            hidden = self._each(F.relu, self._linear(f"{name}.se.squeeze", pooled))
            gates = self._each(torch.sigmoid, self._linear(f"{name}.se.exitation", hidden))
            out = [x * gate[:, None, :, None] for x, gate in zip(out, gates)]
        return [(one + x).relu() for one, x in zip(out, xs)]

    def _convnext(self, name, xs, activation=F.gelu, n_kernels=1):
        parts = [self._conv(f"{name}.dwconvs.{i}", xs) for i in range(n_kernels)]
        out = [torch.cat(one, dim=1) for one in zip(*parts)]
        out = self._each(activation, self._batch_norm(f"{name}.norm", out))
        return [x + one for x, one in zip(xs, self._conv(f"{name}.pwconv1", out))]

    def _time_context(self, name, xs):
        kind = self.config["block_1d_type"]
        x = self._norm(f"{name}.red_dim_conv.1", self._conv(f"{name}.red_dim_conv.0", xs))
        if kind == "fc":
            x = self._norm(f"{name}.tcm.1", self._conv(f"{name}.tcm.0", x))
            x = self._conv(f"{name}.tcm.3", self._each(F.gelu, x))
        elif kind == "att":
            positions = self._norm(f"{name}.tcm.0.norm", self._conv(f"{name}.tcm.0.conv", x))
            x = self._transformer(f"{name}.tcm.1", [a + b for a, b in zip(x, positions)])
        else:
            for i in range(4):
                x = self._convnext(f"{name}.tcm.{i}", x, n_kernels=3 if kind == "conv" else 1)
            if kind == "conv+att":
                x = self._transformer(f"{name}.tcm.4", x)
        return [a + b for a, b in zip(xs, self._conv(f"{name}.exp_dim_conv", x))]

    def _transformer(self, name, xs):
        def layer(x):
            x = x.transpose(1, 2)  # (B, T, C)
            q, k, v = (
                self._linear(f"{name}.attention.{p}_proj", [x])[0]
                .unflatten(-1, (4, -1))
                .transpose(1, 2)
                for p in "qkv"
            )
            weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
            heard = (weights @ v).transpose(1, 2).flatten(2)
            x = x + self._linear(f"{name}.attention.out_proj", [heard])[0]
            x = norm("layer_norm", x)
            hidden = self._linear(f"{name}.feed_forward.intermediate_dense", [x])[0]
            hidden = F.gelu(hidden, approximate="tanh")
            x = x + self._linear(f"{name}.feed_forward.output_dense", [hidden])[0]
            return norm("final_layer_norm", x).transpose(1, 2)

        def norm(which, x):
            weight, bias = (self.state[f"{name}.{which}.{key}"] for key in ("weight", "bias"))
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)

        return self._each(layer, xs)

    def _pool(self, x):
        deviation = (x.var(dim=-1, keepdim=True) + 1e-7).sqrt()
        mean = x.mean(dim=-1, keepdim=True)
        if self.config["pooling_func"] == "TSTP":
            return torch.cat([mean, deviation], dim=1).squeeze(-1)
        context = x
        if self.config["global_context_att"]:
            context = torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1)
        hidden = self._conv("pool.linear1", [context])[0].tanh()
        weights = self._conv("pool.linear2", [hidden])[0].softmax(dim=-1)
        mean = (weights * x).sum(dim=-1)
        variance = (weights * x.square()).sum(dim=-1) - mean.square()
        return torch.cat([mean, variance.clamp_min(1e-7).sqrt()], dim=1)
