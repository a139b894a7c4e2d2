"""What the kernels read: a network's parameters padded, scaled, folded and in the precision of the matrix units."""

import math

import torch
import torch.nn.functional as F
import triton

PRECISIONS = ("fp16", "tf32", "fp16x3", "fp32")
HIDDEN_DIMS = (128, 256, 512)
MAX_STATE_DIM, MAX_ACTION_DIM, MAX_STEPS = 128, 32, 100
LOG2E = math.log2(math.e)


class UnsupportedError(ValueError):
    """The kernels cannot do this. The message is one line that says what they can."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsupportedError(message)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret


def _padded(n: int) -> int:
    """The size of a matrix product's inner dimension: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(n))


class PackedPolicy:
    """A DiffusionPolicy's parameters as the sampler reads them. refresh() packs again what has been trained since.

    Padded: states to 16, 32, 64 or 128 columns, actions to 16 or 32. Folded: the time embedding and the first bias into a table
    (T, H); log2(e) into the first weights and the hidden biases, its inverse into the last weights. fp16x3: each weight times
    2⁸ as the sum of two halves, or the smaller half would be subnormal.
    """

    def __init__(self, policy, precision: str):
        first = policy.mid_layer[0]
        self.policy, self.precision = policy, precision
        self.state_dim, self.action_dim, self.n_timesteps = policy.state_dim, policy.action_dim, policy.n_timesteps
        self.hidden_dim, self.max_action = first.out_features, float(policy.max_action)
        require(precision in PRECISIONS, f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        require(self.hidden_dim in HIDDEN_DIMS, f"hidden_dim {self.hidden_dim} is not one of {HIDDEN_DIMS}")
        for name, value, most in (
            ("state_dim", self.state_dim, MAX_STATE_DIM),
            ("action_dim", self.action_dim, MAX_ACTION_DIM),
            ("n_timesteps", self.n_timesteps, MAX_STEPS),
        ):
            require(1 <= value <= most, f"{name} {value} is not within 1 to {most}")
        self.device = first.weight.device
        self.S, self.A = _padded(self.state_dim), _padded(self.action_dim)
        self.scale = 2.0**-8 if precision == "fp16x3" else 1.0
        H, T, A, S = self.hidden_dim, self.n_timesteps, self.A, self.S
        shapes = {"w_state": (H, S), "w_action": (H, A), "w_2": (H, H), "w_3": (H, H), "w_4": (A, H)}
        dtype = torch.float16 if precision.startswith("fp16") else torch.float32
        self.weights = {}
        for name, shape in shapes.items():
            self.weights[name] = torch.zeros(shape, dtype=dtype, device=self.device)
            low = torch.zeros_like(self.weights[name]) if precision == "fp16x3" else self.weights[name]
            self.weights[name + "_low"] = low
        self.bias = torch.zeros(T, 3, H, device=self.device)
        self.bias_4 = torch.zeros(T, A, device=self.device)
        chain = zip(policy.x0_from_x, policy.x0_from_eps, policy.mean_from_x0, policy.mean_from_x, policy.sigma)
        self.coefficients = torch.tensor(list(chain), dtype=torch.float32, device=self.device)
        self._packed = None
        self.refresh()

    def _versions(self) -> tuple:
        return tuple((p.data_ptr(), p._version) for p in self.policy.parameters())

    def stale(self) -> bool:
        """Whether the parameters were written to since they were packed, as far as their version counters tell.

        Fused optimizers do not count, nor do writes through .data: after those, call refresh().
        """
        return self._packed != self._versions()

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack the policy's present parameters, in place: graphs that read them stay valid. Raises UnsupportedError on NaN."""
        policy, n = self.policy, self.action_dim
        finite = torch.stack([p.isfinite().all() for p in policy.parameters()]).all()
        require(bool(finite), "the policy's weights hold NaN or infinity: the training has diverged")
        first, second, third = (policy.mid_layer[i] for i in (0, 2, 4))
        time_dim = first.in_features - n - self.state_dim
        w_action, w_time, w_state = first.weight.split([n, time_dim, self.state_dim], dim=1)
        embedding = policy.time_mlp(torch.arange(self.n_timesteps, device=self.device))
        biases = F.linear(embedding, w_time, first.bias), second.bias, third.bias
        for i, bias in enumerate(biases):
            self.bias[:, i] = bias * (LOG2E / self.scale)
        self.bias_4[:, :n] = policy.final_layer.bias / self.scale
        self._store("w_state", w_state * LOG2E)
        self._store("w_action", w_action * LOG2E)
        self._store("w_2", second.weight)
        self._store("w_3", third.weight)
        self._store("w_4", policy.final_layer.weight / LOG2E)
        self._packed = self._versions()

    def _store(self, name, weight):
        weight = weight / self.scale
        rows, columns = weight.shape
        high = weight.to(self.weights[name].dtype)
        self.weights[name][:rows, :columns] = high
        if self.precision == "fp16x3":
            self.weights[name + "_low"][:rows, :columns] = weight - high
