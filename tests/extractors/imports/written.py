"""Feature files written by hand to the layouts of LXMERT, BUTD, VinVL, UNITER, MMF, Pythia and MILVLG."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np

D, C, A = 8, 5, 3  # width of a feature, foreground classes, attributes


def regions(seed: int, n: int = 4, size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    """n boxes of an image of `size` px, confidences falling; features that float16 holds exactly."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.5, (n, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.5, (n, 2))], axis=1) * np.array([*size, *size])
    logits = rng.normal(0, 2, (n, C + 1))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return {
        "size": size,
        "boxes": boxes.astype(np.float32),
        "features": rng.integers(0, 2000, (n, D)).astype(np.float32) / 64,
        "conf": np.sort(rng.uniform(0.1, 0.9, n))[::-1].astype(np.float32),
        "obj": rng.integers(0, C, n),
        "attr": rng.integers(0, A, n),
        "attr_conf": rng.uniform(0, 1, n).astype(np.float32),
        "probs": probs.astype(np.float32),
    }


def b64(array: np.ndarray, dtype: str = "<f4") -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def lxmert(key: str, r: dict[str, Any]) -> str:
    w, h = r["size"]
    cells = [key, h, w, b64(r["obj"], "<i8"), b64(r["conf"]), b64(r["attr"], "<i8"), b64(r["attr_conf"]),
             len(r["boxes"]), b64(r["boxes"]), b64(r["features"])]  # fmt: skip
    return "\t".join(map(str, cells)) + "\n"


def butd(key: str, r: dict[str, Any], probs: bool = False) -> str:
    w, h = r["size"]
    cells = [key, w, h, len(r["boxes"]), b64(r["boxes"]), b64(r["features"])]
    return "\t".join(map(str, cells + [b64(r["probs"])] * probs)) + "\n"


def with_geometry(r: dict[str, Any]) -> np.ndarray:
    """VinVL's rows: the feature, the corners as shares of the sides, and the sides of the box as shares."""
    w, h = r["size"]
    shares = r["boxes"] / np.array([w, h, w, h], np.float32)
    return np.concatenate([r["features"], shares, shares[:, 2:] - shares[:, :2]], axis=1).astype(np.float32)


def vinvl(key: str, r: dict[str, Any], columns: int = 2, dtype: str = "<f4") -> str:
    found = b64(with_geometry(r), dtype)
    if columns == 3:
        return f"{key}\t{len(r['boxes'])}\t{found}\n"
    return f"{key}\t{json.dumps({'num_boxes': len(r['boxes']), 'features': found})}\n"


def predictions(key: str, r: dict[str, Any], names: list[str]) -> str:
    rows = zip(r["boxes"].tolist(), r["conf"].tolist(), r["obj"], r["features"], strict=True)
    objects = [{"rect": b, "conf": c, "class": names[o], "feature": b64(f)} for b, c, o, f in rows]
    return f"{key}\t{json.dumps({'objects': objects})}\n"


def uniter_values(r: dict[str, Any]) -> dict[str, np.ndarray]:
    norm_bb = with_geometry(r)[:, -6:]
    found = {"features": r["features"], "norm_bb": norm_bb, "conf": r["conf"], "soft_labels": r["probs"]}
    return {name: array.astype(np.float16) for name, array in found.items()}


def npz(values: dict[str, Any], compressed: bool = True) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **values)
    return out.getvalue()


def numpy_msgpack(values: dict[str, np.ndarray]) -> bytes:
    """What msgpack_numpy makes of a dict of arrays."""
    maps = {k: {b"nd": True, b"type": a.dtype.str, b"kind": b"", b"shape": a.shape, b"data": a.tobytes()}
            for k, a in values.items()}  # fmt: skip
    return msgpack.packb(maps, use_bin_type=True)


def mmf_values(r: dict[str, Any]) -> dict[str, Any]:
    w, h = r["size"]
    info = {"bbox": r["boxes"], "num_boxes": len(r["boxes"]), "objects": r["obj"], "image_width": w, "image_height": h}
    return {"features": r["features"], "cls_prob": r["probs"][:, 1:], **info}


def write_lmdb(path: Path, records: dict[str, bytes], keys: tuple[bytes, bytes] | None) -> Path:
    env = lmdb.open(str(path), map_size=1 << 30)
    with env.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode(), value)
        if keys is not None:
            transaction.put(*keys)
    env.close()
    return path


def uniter_lmdb(path: Path, images: dict[str, dict[str, Any]], dump: Any = npz, keys: bool = True) -> Path:
    records = {f"{name}.npz": dump(uniter_values(r)) for name, r in images.items()}
    return write_lmdb(path, records, (b"__keys__", json.dumps(list(records)).encode()) if keys else None)


def mmf_lmdb(path: Path, images: dict[str, dict[str, Any]], protocol: int = 4) -> Path:
    records = {name: pickle.dumps(mmf_values(r), protocol) for name, r in images.items()}
    return write_lmdb(path, records, (b"keys", pickle.dumps([name.encode() for name in records])))
