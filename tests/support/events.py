"""TensorBoard files, read back without TensorBoard."""

import struct

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event


def read_events(folder, pattern="**/events*"):
    """Every event of the files under a folder, checked by their checksums, files in order of their names."""
    events = []
    for path in sorted(folder.glob(pattern)):
        raw = path.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            for data, stored in ((raw[:8], raw[8:12]), (raw[12 : 12 + size], raw[12 + size : 16 + size])):
                crc = crc32c(data)
                assert struct.unpack("<I", stored) == ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF,)
            events.append(Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
    return events


def scalars(folder):
    """(name, iteration) -> value."""
    values = [
        (v.tag, e.step, v.simple_value) for e in read_events(folder) for v in e.summary.value if not v.HasField("image")
    ]
    return {(tag, step): value for tag, step, value in values}


def curves(folder, pattern="**/events*"):
    """name -> [(iteration, value)] in the order of writing, as TensorBoard shows them: a start supersedes all from its iteration on."""
    found = {}
    for event in read_events(folder, pattern):
        if event.HasField("session_log"):
            found = {name: [point for point in curve if point[0] < event.step] for name, curve in found.items()}
        for value in event.summary.value:
            if not value.HasField("image") and not value.metadata.plugin_data.plugin_name:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def pictures(folder):
    """name -> (height, width)."""
    values = [v for e in read_events(folder) for v in e.summary.value if v.HasField("image")]
    return {value.tag: (value.image.height, value.image.width) for value in values}


def hyperparameters(folder):
    """The options that the dashboard of hyperparameters shows of a run: name -> value."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    values = [v for e in read_events(folder, "events*") for v in e.summary.value]
    contents = [v.metadata.plugin_data.content for v in values if v.metadata.plugin_data.plugin_name == "hparams"]
    starts = [
        data for content in contents if (data := HParamsPluginData.FromString(content)).HasField("session_start_info")
    ]
    kinds = {name: (value, value.WhichOneof("kind")) for name, value in starts[-1].session_start_info.hparams.items()}
    return {name: getattr(value, kind) for name, (value, kind) in kinds.items()}
