"""A skeleton in three dimensions: posed, turned and projected."""

import numpy as np

from .canvas import Point

__all__ = ["Pose"]


class Pose:
    """Joints of a walking or standing body, in body heights, turned by `yaw` and projected to the canvas.

    The body's axes: x to its left, y down, z ahead; yaw 0 faces the camera.
    """

    def __init__(self, rng: np.random.Generator, walking: bool, yaw: float, build: float, scale: float, foot: Point):
        self.cos, self.sin, self.scale, self.foot = float(np.cos(yaw)), float(np.sin(yaw)), scale, foot
        stride = rng.uniform(0.28, 0.5) if walking else rng.uniform(0.0, 0.08)
        swing = stride * float(rng.choice((-1, 1))) * (rng.uniform(0.35, 1.0) if walking else 1.0)
        spread = rng.uniform(0.0, 0.05)
        rng.uniform()  # drawn and not used: without it, every later number and so every picture would change
        shoulder, hip = 0.108 * build, 0.055 * build
        self.joints: dict[str, tuple[float, float, float]] = {}
        for side, sign in (("l", 1), ("r", -1)):
            thigh = sign * swing
            bend = 0.12 + (0.75 * abs(swing) if thigh < 0 else 0.05)  # the leg behind bends its knee
            knee = (sign * (hip + spread * 0.4), 0.525 + 0.215 * np.cos(thigh), 0.215 * np.sin(thigh))
            ankle = (
                sign * (hip + spread * 0.8),
                knee[1] + 0.215 * np.cos(thigh - bend),
                knee[2] + 0.215 * np.sin(thigh - bend),
            )
            toe = (ankle[0] + sign * 0.018, ankle[1] + 0.025, ankle[2] + 0.085)
            arm = -sign * swing * 0.8 + rng.normal(0, 0.06)
            elbow_bend = rng.uniform(0.1, 0.45) if rng.random() < 0.75 else rng.uniform(0.6, 1.7)
            out = rng.uniform(0.012, 0.045)
            elbow = (sign * (shoulder + out), 0.205 + 0.16 * np.cos(arm), 0.16 * np.sin(arm))
            hand = (
                sign * (shoulder + out * 0.7),
                elbow[1] + 0.155 * np.cos(arm + elbow_bend),
                elbow[2] + 0.155 * np.sin(arm + elbow_bend),
            )
            self.joints |= {
                f"hip_{side}": (sign * hip, 0.525, 0.0),
                f"knee_{side}": knee,
                f"ankle_{side}": ankle,
                f"toe_{side}": toe,
                f"shoulder_{side}": (sign * shoulder, 0.205, 0.0),
                f"elbow_{side}": elbow,
                f"hand_{side}": hand,
            }
        self.ground = max(self.joints["ankle_l"][1], self.joints["ankle_r"][1]) + 0.035
        self.nod = float(rng.normal(0, 0.006))

    def at(self, x: float, y: float, z: float) -> Point:
        """Canvas position of a point of the body."""
        return (
            self.foot[0] + (x * self.cos + z * self.sin) * self.scale,
            self.foot[1] + (y - self.ground) * self.scale,
        )

    def joint(self, name: str) -> Point:
        return self.at(*self.joints[name])

    def depth(self, x: float, z: float) -> float:
        """Towards the camera."""
        return z * self.cos - x * self.sin

    def half_width(self, across: float, along: float) -> float:
        """Half the silhouette of an elliptic ring with half-axes `across` and `along` the walking direction."""
        return float(np.hypot(across * self.cos, along * self.sin)) * self.scale

    def outline(self, rings: list[tuple[float, float, float]]) -> list[Point]:
        """Silhouette of a body of elliptic rings (y, across, along), top to bottom."""
        left, right = [], []
        for y, across, along in rings:
            x, screen_y = self.at(0, y, 0)
            half = self.half_width(across, along)
            left.append((x - half, screen_y))
            right.append((x + half, screen_y))
        return left + right[::-1]
