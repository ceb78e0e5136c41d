"""Routes for the tests of the router and of what it reads from a header."""

from __future__ import annotations

from dicomnode.config import Route
from dicomnode.router import Router

CT = "1.2.840.10008.5.1.4.1.1.2"


def forward(name: str, **settings: object) -> Route:
    return Route.model_validate({"name": name, "action": "forward", "send_to": ["pacs"], **settings})


def denoise(name: str, **settings: object) -> Route:
    return Route.model_validate({"name": name, "pipeline": "st3d", "send_to": ["pacs"], **settings})


EVERY_CONDITION: list[object] = [
    {"exists": True},
    {"not": {"exists": True}},
]
ALL_KINDS = Router(
    [
        forward(f"{keyword}-{number}", when={keyword: condition}, **{"continue": True})
        for keyword, kinds in {
            "Modality": ["CT", ["CT", "MR"], {"regex": "(?i)a.?b|^C"}, {"not": {"regex": "x$"}}],
            "PatientID": ["A", {"regex": "^A"}],
            "SeriesDescription": [{"regex": "low.*dose"}],
            "SliceThickness": [1.5, [0, 1], {"max": 1.5}, {"min": -1, "max": 1e300}, {"not": {"min": 0}}],
            "Rows": [512, {"max": 512}],
        }.items()
        for number, condition in enumerate([*kinds, *EVERY_CONDITION])
    ]
    + [denoise("last", when={"CallingAETitle": {"not": "X"}})]
)
