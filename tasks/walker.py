"""A walking controller for the antmaze ant: 50 constants, no network, no memory.

It was found by CMA-ES in simulation, and stands in for the trained walker behind D4RL's antmaze
data: a planner chooses the direction, this chooses what the eight joints do. It depends on the
current state and the direction only, and even the phase of its gait is read from the joints. Data
made with it are therefore Markov in the observation, as offline reinforcement learning assumes.

With the planner and D4RL's action noise of 0.2, of 200 ants in the umaze 95.5 % reach their goal
(python -m experiments.d4rl_policies FOLDER).

Frames and notation
    Leg i = 0..3 stands at the body angle φᵢ = 45° + 90°·i, with the radial unit vector
    rᵢ = (cos φᵢ, sin φᵢ) and the tangential one tᵢ = (-sin φᵢ, cos φᵢ). Three plane vectors are
    projected on them, written ·ᵣ and ·ₜ:
        ψ  the commanded direction, in the yaw frame (the world frame rotated by the torso's yaw)
        g  world-down in the body frame: how the torso leans
        v  the torso's velocity in the yaw frame
    ω is the yaw rate, z the torso's height, ż its rate. Ankle angles are counted so that positive
    means the same for every leg.

Gait
    Legs trot in diagonal pairs: leg i has phase φ + π·(i mod 2), with cosine c and sine s.
        hip target   = ψₜ(c·a₁ + s·a₂ + a₃) + a₄gₜ + a₅vₜ + a₆ω            clipped to ±0.52
        ankle target = b₁ + b₂c + b₃s + ψᵣ(b₄c + b₅s + b₆) + b₇gᵣ + b₈vᵣ + b₉(z - 0.5)
                       + ψₜ²(b₁₀c + b₁₁s + b₁₂) + b₁₃ż                     clipped to [0.4, 1.3]
        action       = clip(K_p(target - angle) - K_d·velocity, ±1)
    The phase is a linear function of the joints, fitted on the same gait driven by a clock:
    (cos φ, sin φ) ∝ f·W, where f sums 14 joint terms over the legs with alternating sign. φ is then
    advanced by 0.1.
"""

import numpy as np

# The legs' body angles, and the indices of their hip joints; each ankle's follows its hip's.
# MuJoCo's order of actuators is hip 4, ankle 4, hip 1, ankle 1, ...
LEG_ANGLES = np.pi / 4 + np.pi / 2 * np.arange(4)
RADIAL = np.stack([np.cos(LEG_ANGLES), np.sin(LEG_ANGLES)])
TANGENT = np.stack([-np.sin(LEG_ANGLES), np.cos(LEG_ANGLES)])
HIP_QPOS = np.array([7, 9, 11, 13])
HIP_ACTUATOR = np.array([2, 4, 6, 0])
ANKLE_SIGN = np.array([1.0, -1.0, -1.0, 1.0])
PAIR_SIGN = np.array([1.0, -1.0, 1.0, -1.0])  # the cosine of π·(i mod 2)

STIFFNESS, DAMPING = 1.738, 0.15
HIP = np.array([-1.8, -1.597, -0.874, 0.572, -0.177, -0.106])
ANKLE = np.array(
    [1.176, 0.269, 1.28, -0.775, 2.343, 0.876, 1.119, 0.006, 0.516, 1.413, -0.258, -0.27, 0.148]
)
PHASE_ADVANCE = 0.1
PHASE = np.array([  # rows: the terms of gait_phase; columns: cosine and sine
    [-0.28, 0.435], [0.01, 0.009], [0.238, -0.038], [0.001, -0.029], [-0.47, -0.384],
    [-0.015, 0.01], [0.001, 0.004], [0.0, 0.0], [0.018, 0.003], [0.001, -0.001],
    [-0.005, 0.0], [-0.001, -0.001], [-0.023, -0.025], [0.013, 0.013],
])  # fmt: skip


def walk(qpos: np.ndarray, qvel: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Actions (n, 8) in [-1, 1] that make ants walk along `direction`, unit vectors (n, 2).

    The ants are at qpos (n, 15), qvel (n, 14).
    """
    w, x, y, z = qpos[:, 3:7].T
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    command = into_yaw_frame(direction, yaw)
    velocity = into_yaw_frame(qvel[:, :2], yaw)
    lean = np.stack([2 * (w * y - x * z), -2 * (y * z + w * x)], axis=1)
    command_r, command_t = command @ RADIAL, command @ TANGENT

    hip, hip_speed = qpos[:, HIP_QPOS], qvel[:, HIP_QPOS - 1]
    ankle, ankle_speed = ANKLE_SIGN * qpos[:, HIP_QPOS + 1], ANKLE_SIGN * qvel[:, HIP_QPOS]
    phase = gait_phase(command_r, command_t, hip, hip_speed, ankle, ankle_speed)
    c, s = PAIR_SIGN * np.cos(phase)[:, None], PAIR_SIGN * np.sin(phase)[:, None]

    swing = HIP[0] * c + HIP[1] * s + HIP[2]
    upright = HIP[3] * (lean @ TANGENT) + HIP[4] * (velocity @ TANGENT) + HIP[5] * qvel[:, 5:6]
    hip_target = command_t * swing + upright
    lift = ANKLE[0] + ANKLE[1] * c + ANKLE[2] * s
    push = command_r * (ANKLE[3] * c + ANKLE[4] * s + ANKLE[5])
    sidestep = command_t**2 * (ANKLE[9] * c + ANKLE[10] * s + ANKLE[11])
    balance = ANKLE[6] * (lean @ RADIAL) + ANKLE[7] * (velocity @ RADIAL)
    height = ANKLE[8] * (qpos[:, 2:3] - 0.5) + ANKLE[12] * qvel[:, 2:3]
    ankle_target = lift + push + sidestep + balance + height

    hip_torque = STIFFNESS * (np.clip(hip_target, -0.52, 0.52) - hip) - DAMPING * hip_speed
    ankle_torque = STIFFNESS * (np.clip(ankle_target, 0.4, 1.3) - ankle) - DAMPING * ankle_speed
    actions = np.empty((len(qpos), 8))
    actions[:, HIP_ACTUATOR] = hip_torque
    actions[:, HIP_ACTUATOR + 1] = ANKLE_SIGN * ankle_torque
    return np.clip(actions, -1, 1)


def into_yaw_frame(vectors: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Plane vectors (n, 2) of the world, in frames rotated by yaw (n,)."""
    c, s = np.cos(yaw), np.sin(yaw)
    x, y = vectors[:, 0], vectors[:, 1]
    return np.stack([c * x + s * y, c * y - s * x], axis=1)


def gait_phase(command_r, command_t, hip, hip_speed, ankle, ankle_speed) -> np.ndarray:
    """The phase φ (n,) of the first diagonal pair of legs. All arguments are (n, 4)."""
    terms = [
        ankle, ankle_speed, command_t * hip, command_t * hip_speed, command_r * ankle,
        command_r * ankle_speed, command_r * hip, command_r * hip_speed, command_t * ankle,
        command_t * ankle_speed, hip, hip_speed, command_t**2 * ankle, command_t**2 * ankle_speed,
    ]  # fmt: skip
    reading = np.stack([term @ PAIR_SIGN for term in terms], axis=1) @ PHASE
    return np.arctan2(reading[:, 1], reading[:, 0]) + PHASE_ADVANCE
