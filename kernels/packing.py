"""What the kernels read: parameters padded, scaled and in the precision of the matrix units."""

import copy
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import triton

PRECISIONS = ("fp16", "tf32", "fp16x3", "fp32")
HIDDEN_DIMS = (128, 256, 512)
MAX_STATE_DIM, MAX_ACTION_DIM, MAX_STEPS = 128, 32, 100
LOG2E = math.log2(math.e)
FP16_MOST = torch.finfo(torch.float16).max
NO_GPU = "kernels need CUDA tensors, or TRITON_INTERPRET=1 for the interpreter"
UNNAMED = (
    "name what is fused to the graph, as in Captured(function, ..., fused=[actor]): "
    "it packs changed weights"
)


class UnsupportedError(ValueError):
    """The kernels cannot do this. The message is one line that says what they can."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsupportedError(message)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret


def require_tensor(name: str, tensor: torch.Tensor, shape: tuple, device: torch.device) -> None:
    """Raises UnsupportedError unless tensor is contiguous float32 of this shape on this device."""
    have = f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    fits = tensor.shape == shape and tensor.dtype == torch.float32
    require(fits, f"{have}; it must be {shape} float32")
    require(tensor.device == device, f"{have}; the policy is on {device}")
    require(tensor.is_contiguous(), f"{name} must be contiguous: pass {name}.contiguous()")
    require(tensor.numel() > 0, f"{name} has no rows")
    require(tensor.is_cuda or interpreting(), NO_GPU)


def on(device: torch.device):
    """A context in which launches go to this device: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def architecture(device: torch.device) -> int:
    """The GPU's sm_XX as a number, 90 in the interpreter. Raises UnsupportedError below sm_80."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    require(major >= 8, f"this GPU is sm_{major}{minor}; the kernels need sm_80 (A100) or newer")
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many SMs the GPU has; none in the interpreter, where programs run one after the other."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Finite float32 x rounded to eleven bits, halves away from 0, as ops.to_tf32 does."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def padded(n: int) -> int:
    """The size of a matrix product's inner dimension: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(n))


class _Packed:
    """Networks [s|a] -> H -> H -> H -> out with mish, stacked, as network.network reads them.

    States are padded to 16, 32, 64 or 128 columns, actions and outputs to 16 or 32. log2(e) is
    folded into the first weights and the hidden biases, its inverse into the last weights. fp16x3
    holds each weight times 2⁴ as the sum of two halves: without the factor the smaller half would
    be subnormal.

    weights (n_networks, block): a network's five matrices (H,S), (H,A), (H,H), (H,H), (OUT,H) one
    after the other; low: its lower half, or weights itself where there is none. bias
    (n_biases, 3·H + OUT). state_at, action_at: where states and actions begin among the columns of
    the first layer's weights.
    """

    KIND: str
    NETWORKS: int  # of a module
    state_at: int
    action_at: int

    def __init__(self, modules: list, precision: str, hidden_dim: int, n_out: int, biases: int):
        known = f"precision {precision!r} is not one of {', '.join(PRECISIONS)}"
        require(precision in PRECISIONS, known)
        known = f"hidden_dim {hidden_dim} is not one of {HIDDEN_DIMS}"
        require(hidden_dim in HIDDEN_DIMS, known)
        self.modules, self.precision, self.hidden_dim = modules, precision, hidden_dim
        self.state_dim, self.action_dim = modules[0].state_dim, modules[0].action_dim
        for name, most in (("state_dim", MAX_STATE_DIM), ("action_dim", MAX_ACTION_DIM)):
            value = getattr(self, name)
            require(1 <= value <= most, f"{name} {value} is not within 1 to {most}")
        self.n_out = n_out
        self.device = next(modules[0].parameters()).device
        self.S, self.A, self.OUT = padded(self.state_dim), padded(self.action_dim), padded(n_out)
        self.scale = 2.0**-4 if precision == "fp16x3" else 1.0
        H, n_networks = hidden_dim, self.NETWORKS * len(modules)
        self.shapes = (H, self.S), (H, self.A), (H, H), (H, H), (self.OUT, H)
        dtype = torch.float16 if precision.startswith("fp16") else torch.float32
        block = sum(math.prod(shape) for shape in self.shapes)
        self.weights = torch.zeros(n_networks, block, dtype=dtype, device=self.device)
        self.low = torch.zeros_like(self.weights) if precision == "fp16x3" else self.weights
        self.biases = biases  # of a network: one for each timestep
        self.bias = torch.zeros(n_networks * biases, 3 * H + self.OUT, device=self.device)
        self.captured = False  # by a graph that packs changed weights before it replays
        self._seen = None
        self.refresh()

    def layers(self, module) -> list:
        """The four linear layers of each of a module's networks."""
        raise NotImplementedError

    def first_bias(self, module, first) -> torch.Tensor:
        """The biases of a network's first layer, (biases, H)."""
        raise NotImplementedError

    def matrices(self, block: torch.Tensor) -> list:
        """A network's block, or another vector laid out like it -> its five matrices, padded."""
        pieces = block.split([math.prod(shape) for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes)]

    def _parameters(self):
        return (p for module in self.modules for p in module.parameters())

    def _state_of_training(self) -> tuple:
        return tuple((p.data_ptr(), p._version) for p in self._parameters())

    def stale(self) -> bool:
        """Whether the parameters may have changed since they were packed.

        Each tensor counts the writes to it. Some are not counted: those through .data, by a
        replayed graph, or by an optimizer made with fused=True. Whoever makes them raises the
        counters (torch.autograd.graph.increment_version) or calls refresh().
        """
        return self._seen != self._state_of_training()

    def remember(self) -> None:
        """What is packed are the present parameters."""
        self._seen = self._state_of_training()

    def freshen(self) -> None:
        """Pack again if the parameters have changed.

        During a capture that is impossible, and replays would keep today's weights: raises
        UnsupportedError unless a graphs.Captured looks after these networks.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            require(self.captured, UNNAMED)
        elif self.stale():
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack the present parameters, in place: graphs that read them stay valid.

        Raises UnsupportedError for NaN, and for weights that the precision cannot hold.
        """
        finite = torch.stack([p.isfinite().all() for p in self._parameters()]).all()
        diverged = f"weights of the {self.KIND} hold NaN or infinity: the training has diverged"
        require(bool(finite), diverged)
        networks = ((module, layers) for module in self.modules for layers in self.layers(module))
        for i, (module, (first, second, third, last)) in enumerate(networks):
            own, H = self.bias[i * self.biases : (i + 1) * self.biases], self.hidden_dim
            biases = self.first_bias(module, first), second.bias, third.bias
            for layer, bias in enumerate(biases):
                own[:, layer * H : (layer + 1) * H] = bias * (LOG2E / self.scale)
            own[:, 3 * H : 3 * H + self.n_out] = last.bias / self.scale
            w_state = first.weight[:, self.state_at :][:, : self.state_dim] * LOG2E
            w_action = first.weight[:, self.action_at :][:, : self.action_dim] * LOG2E
            hidden = second.weight, third.weight
            matrices = w_state, w_action, *hidden, last.weight * (1 / LOG2E)
            places = zip(self.matrices(self.weights[i]), self.matrices(self.low[i]))
            for (high, low), matrix in zip(places, matrices):
                rows, columns = matrix.shape
                matrix = matrix / self.scale
                high[:rows, :columns] = to_tf32(matrix) if self.precision == "tf32" else matrix
                if self.precision == "fp16x3":
                    low[:rows, :columns] = matrix - high[:rows, :columns]
        if self.precision.startswith("fp16"):
            reached = f"weights of the {self.KIND} reach {FP16_MOST * self.scale:,.0f}"
            held = bool(self.weights.isfinite().all())
            require(held, f"{reached}, which {self.precision} cannot hold")
        self.remember()


class PackedPolicy(_Packed):
    """DiffusionPolicies: the time embedding and the first bias become a table (T, H) each."""

    KIND, NETWORKS = "policy", 1

    def __init__(self, policies: list, precision: str):
        policy = policies[0]
        T, A, first = policy.n_timesteps, policy.action_dim, policy.mid_layer[0]
        require(1 <= T <= MAX_STEPS, f"n_timesteps {T} is not within 1 to {MAX_STEPS}")
        self.n_timesteps, self.max_action = T, float(policy.max_action)
        self.action_at, self.time_at, self.state_at = 0, A, first.in_features - policy.state_dim
        super().__init__(policies, precision, first.out_features, A, T)
        chain = policy.x0_from_x, policy.x0_from_eps, policy.mean_from_x0, policy.mean_from_x
        rows = list(zip(*chain, policy.sigma))
        self.coefficients = torch.tensor(rows, dtype=torch.float32, device=self.device)  # (T, 5)

    def layers(self, policy) -> list:
        return [[*policy.mid_layer[::2], policy.final_layer]]

    def first_bias(self, policy, first) -> torch.Tensor:
        # In float64, which neither autocast nor TF32 touches: all steps of all chains read this.
        time_mlp = copy.deepcopy(policy.time_mlp).double()
        t = torch.arange(self.n_timesteps, dtype=torch.float64, device=self.device)
        w_time = first.weight[:, self.time_at : self.state_at]
        return F.linear(time_mlp(t), w_time.double(), first.bias.double())


class PackedCritic(_Packed):
    """Both networks of TwinCritics, one after the other."""

    KIND, NETWORKS = "critic", 2

    def __init__(self, critics: list, precision: str):
        first = critics[0].q1_model[0]
        self.state_at, self.action_at = 0, critics[0].state_dim
        super().__init__(critics, precision, first.out_features, 1, 1)

    def layers(self, critic) -> list:
        return [list(model[::2]) for model in (critic.q1_model, critic.q2_model)]

    def first_bias(self, critic, first) -> torch.Tensor:
        return first.bias[None]
