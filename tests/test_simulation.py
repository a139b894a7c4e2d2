"""tasks/simulation.py: models as D4RL's MuJoCo had them. The tasks' tests look at its steps."""

import mujoco
import numpy as np
import pytest
from mujoco210 import NAMES, inertias, make_world, recorded

from tasks.simulation import compile_spec


@pytest.mark.parametrize("name", NAMES)
def test_bodies_are_mujoco_210s(name):
    """Masses, centres and inertias.

    The kitchen's inertias come from meshes, boxes and cylinders in single precision; the pen's hand
    has capsules, but its masses and inertias are given.
    """
    expected = recorded(name)
    bound = 1e-6 if name == "kitchen" else 1e-12
    with make_world(name, 1) as world:
        model = world.simulation.model
        np.testing.assert_allclose(model.body_mass, expected["body_mass"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(model.body_ipos, expected["body_ipos"], rtol=0, atol=bound)
        mine = inertias(model.body_inertia, model.body_iquat)
    theirs = inertias(expected["body_inertia"], expected["body_iquat"])
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=bound)


CAPSULES = {
    "by its ends": 'fromto="1 2 3 1 2 3.8" size="0.1"',
    "by its length": 'pos="1 2 3.4" size="0.1 0.4"',
}


@pytest.mark.parametrize("where", CAPSULES.values(), ids=CAPSULES)
@pytest.mark.parametrize("mass", [None, 7.0])
def test_a_capsule_weighs_as_a_cylinder_half_a_radius_longer(where, mass):
    """At each end. A mass that is given stays, and so does the shape that collides."""
    given = "" if mass is None else f'mass="{mass}"'
    geom = f'<geom type="capsule" density="500" {where} {given}/>'
    body = f"<body><freejoint/>{geom}</body>"
    spec = mujoco.MjSpec.from_string(f"<mujoco><worldbody>{body}</worldbody></mujoco>")
    model = compile_spec(spec)
    r, length = 0.1, 0.8 + 0.1
    m = mass or 500 * np.pi * r**2 * length
    across, along = m * (3 * r**2 + length**2) / 12, m * r**2 / 2
    np.testing.assert_allclose(model.body_mass[1], m)
    np.testing.assert_allclose(model.body_ipos[1], [1, 2, 3.4])
    tensor = inertias(model.body_inertia, model.body_iquat)[1]
    np.testing.assert_allclose(tensor, np.diag([across, across, along]), atol=1e-12)
    np.testing.assert_allclose(model.geom_size[0, :2], [0.1, 0.4])
    np.testing.assert_allclose(model.body_subtreemass[0], m)


def test_a_body_with_given_inertia_keeps_it():
    inertial = '<inertial pos="0 0 1" mass="2" diaginertia="3 3 1"/>'
    body = f'<body>{inertial}<freejoint/><geom type="capsule" size="0.1 0.4"/></body>'
    spec = mujoco.MjSpec.from_string(f"<mujoco><worldbody>{body}</worldbody></mujoco>")
    model = compile_spec(spec)
    assert model.body_mass[1] == 2.0
    np.testing.assert_array_equal(model.body_ipos[1], [0, 0, 1])
    np.testing.assert_allclose(np.sort(model.body_inertia[1]), [1, 3, 3])
