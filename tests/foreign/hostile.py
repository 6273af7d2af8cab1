"""Files that somebody made to do harm, each as bytes. None of them may run anything, take memory or time."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

MODULE = "onward_hostile_module"  # importing it, were it there, would be seen in sys.modules


def torch_zip(data: bytes, storages: dict[str, bytes] | None = None, **settings) -> bytes:
    """A zip as torch.save lays it out, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **settings) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", b"little")
        for key, content in (storages or {}).items():
            file.writestr(f"archive/data/{key}", content)
    return out.getvalue()


def legacy(*pickles: bytes, rest: bytes = b"") -> bytes:
    """The format before 1.6, around any pickles."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(value, 2) for value in head) + b"".join(pickles) + rest


def reduce(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls a function."""
    inner = pickle.dumps(arguments, 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + inner + b"R."


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4, key: str = "0") -> bytes:
    """A pickle of one float tensor over a storage of `count` elements."""

    def put(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(" + put("storage") + b"ctorch\nFloatStorage\n" + put(key) + put("cpu") + put(count) + b"tQ"
    rest = put(offset) + put(shape) + put(stride) + b"\x89)"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."


def calls(marker: str) -> dict[str, bytes]:
    """Pickles that would run something if they were believed; it would leave the file `marker`."""
    shell = f"touch {marker}"
    code = f"open({marker!r}, 'w').close()"
    nested = b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\n(X\x02\x00\x00\x00ostRX\x06\x00\x00\x00systemtR"
    state = b"\x80\x02c" + f"{MODULE}\nEvil\n".encode() + b")\x81}X\x01\x00\x00\x00aK\x01sb."
    return {
        "os.system": reduce("os", "system", shell),
        "posix.system": reduce("posix", "system", shell),
        "subprocess": reduce("subprocess", "check_output", shell),
        "eval": reduce("builtins", "eval", code),
        "exec": reduce("__builtin__", "exec", code),
        "import": reduce("builtins", "__import__", MODULE),
        "importlib": reduce("importlib", "import_module", MODULE),
        "pydoc": reduce("pydoc", "locate", f"{MODULE}.Evil"),
        "torch.load": reduce("torch", "load", marker),
        "load_from_bytes": reduce("torch.storage", "_load_from_bytes", reduce("os", "system", shell)),
        "pickle in pickle": reduce("pickle", "loads", reduce("os", "system", shell)),
        "getattr of import": nested + f"(X{struct.pack('<I', len(shell)).decode()}{shell}tR.".encode(),
        "setstate": state,
        "inst": b"(S'" + shell.encode() + b"'\nios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\nX" + struct.pack("<I", len(shell)) + shell.encode() + b"o.",
        "newobj": b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(shell)) + shell.encode() + b"\x85\x81.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(shell)]) + shell.encode() + b"\x85R.",
        "submodule": b"\x80\x04\x8c\x08builtins\x8c\x0ceval.__call__\x93\x8c\x011\x85R.",
        "dictionary of a class": b"\x80\x02c" + f"{MODULE}\nEvil\n".encode() + b")\x81X\x01\x00\x00\x00aK\x01s.",
        "list of a class": b"\x80\x02c" + f"{MODULE}\nEvil\n".encode() + b")\x81(K\x01K\x02e.",
    }


def bombs() -> dict[str, bytes]:
    """Pickles that would take memory or time without end, or that make no sense."""
    deep = b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."
    doubling = b"\x80\x02K\x01" + b"2\x86" * 200  # a tuple of itself twice, two hundred times over
    text = b"\x80\x02X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00"
    encoded = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR0"
    numbers = b"\x80\x02](" + b"K\x01K\x02\x86" * 100_000 + b"eq\x00"
    return {
        "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
        "huge bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
        "huge integer": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"\x01.",
        "negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
        "long decimal": b"L" + b"9" * 100_000 + b"L\n.",
        "deep lists": deep[:-1],
        "hash of a doubled tuple": b"\x80\x02}" + doubling[2:] + b"K\x01s.",
        "set of a doubled tuple": b"\x80\x04\x8f(" + doubling[2:] + b"\x90.",
        "encoded again and again": text + encoded * 5000 + b".",
        "dictionaries again and again": numbers + b"ccollections\nOrderedDict\nh\x00\x85R0" * 5000 + b".",
        "sizes of text": text + b"ctorch\nSize\nh\x00\x85R0" * 5000 + b".",
        "colliding keys": b"\x80\x02}("
        + b"".join(b"\x8a\x0c" + (i * ((1 << 61) - 1)).to_bytes(12, "little") + b"K\x01" for i in range(1, 2000))
        + b"u.",
        "endless memo": b"\x80\x02K\x01" + b"q\x00h\x000" * 400_000 + b"K\x01.",
        "memo that is not there": b"\x80\x02h\x07.",
        "mark in the memo": b"\x80\x02(q\x00h\x00.",
        "put before anything": b"\x80\x02q\x00.",
        "empty stack": b"\x80\x02R.",
        "only a stop": b"\x80\x02.",
        "unknown opcode": b"\x80\x02\xff.",
        "extension": b"\x80\x02\x82\x01.",
        "outside reference": b"\x80\x02K\x01Q.",
        "text reference": b"Psomething\n.",
        "next buffer": b"\x80\x05\x97.",
        "no stop": b"\x80\x02K\x01",
        "arguments that are none": b"\x80\x02cos\nsystem\nK\x01R.",
        "call of a number": b"\x80\x02K\x01)R.",
        "state of a number": b"\x80\x02K\x01}b.",
        "items of a number": b"\x80\x02K\x01K\x02K\x03s.",
        "append to a dictionary": b"\x80\x02}K\x01a.",
        "array without a type": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01)NK\x00Ntb.",
        "scalar without a type": reduce("numpy.core.multiarray", "scalar", 1, b"a"),
        "tensor of a number": reduce("torch._utils", "_rebuild_tensor_v2", 1, 0, (2,), (1,), False, None),
    }


def containers() -> dict[str, bytes]:
    """Files that lie about their parts."""
    good = torch_zip(tensor((2, 2), (2, 1)), {"0": bytes(16)})
    end = good.rindex(b"PK\x05\x06")
    entry = good.index(b"PK\x01\x02")
    many = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFF0, 0, 0)
    return {
        "empty": b"",
        "text": b"hello, this is no checkpoint\n",
        "zeros": bytes(4096),
        "truncated zip": good[:-30],
        "half a zip": good[: len(good) // 2],
        "zip bomb": torch_zip(b"\x80\x02N." + bytes(50_000_000), compression=zipfile.ZIP_DEFLATED),
        "no pickle in it": torch_zip(b"")[:0] + _zip({"a.txt": b"x"}),
        "two pickles in it": _zip({"a/data.pkl": b"\x80\x02N.", "b/data.pkl": b"\x80\x02N."}),
        "climbs": _zip({"../data.pkl": tensor((2,), (1,)), "../data/0": bytes(16)})[:-4],
        "big-endian": _zip(
            {"archive/data.pkl": tensor((4,), (1,)), "archive/byteorder": b"big", "archive/data/0": bytes(16)}
        ),
        "table of contents elsewhere": good[: end + 16] + struct.pack("<L", 1 << 31) + good[end + 20 :],
        "entry elsewhere": good[: entry + 42] + struct.pack("<L", 7) + good[entry + 46 :],
        "entry too long": good[: entry + 20] + struct.pack("<2L", 1 << 30, 1 << 30) + good[entry + 28 :],
        "endless table of contents": b"PK\x03\x04" + bytes(100) + many,
        "storage that is not there": torch_zip(tensor((2,), (1,), key="7"), {"0": bytes(16)}),
        "storage that is too short": torch_zip(tensor((2,), (1,), count=1000), {"0": bytes(16)}),
        "tensor beyond its storage": torch_zip(tensor((2, 3), (3, 1)), {"0": bytes(16)}),
        "tensor behind its storage": torch_zip(tensor((2,), (1,), offset=3), {"0": bytes(16)}),
        "tensor of many of one number": torch_zip(tensor((1 << 40,), (0,)), {"0": bytes(16)}),
        "tensor of negative size": torch_zip(tensor((-1,), (1,)), {"0": bytes(16)}),
        "tensor of negative stride": torch_zip(tensor((2,), (-1,), offset=1), {"0": bytes(16)}),
        "tensor of absurd size": torch_zip(tensor((1 << 70,), (1,)), {"0": bytes(16)}),
        "strides that do not fit": torch_zip(tensor((2, 2), (1,)), {"0": bytes(16)}),
        "legacy, nothing behind the head": legacy(),
        "legacy, storage missing": legacy(tensor((2,), (1,)), pickle.dumps([], 2)),
        "legacy, storage truncated": legacy(tensor((2,), (1,)), pickle.dumps(["0"], 2), rest=struct.pack("<q", 4)),
        "legacy, storage of another size": legacy(
            tensor((2,), (1,)), pickle.dumps(["0"], 2), rest=struct.pack("<q", 1 << 40) + bytes(16)
        ),
        "legacy, keys that are none": legacy(tensor((2,), (1,)), pickle.dumps(7, 2), rest=bytes(24)),
    }


def _zip(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return out.getvalue()
