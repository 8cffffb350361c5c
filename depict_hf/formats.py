"""Label maps in the formats of other tools: COCO's run lengths and GeoJSON's polygons, both exact to the pixel."""

from typing import Any

import numpy as np

Ring = list[list[int]]


def coco_file(ids: np.ndarray, names: list[str], file_name: str, image_id: int) -> dict[str, Any]:
    """Write one photograph's label map as a COCO data set, whose masks pycocotools decodes.

    Args:
        ids: `(height, width)`, class ids; those beyond `names`, such as 255, belong to no class.
        names: Names by class id, which is the category's id too.
        file_name: File name of the photograph.
        image_id: A number from 1 on. Files made with different ones can be joined: annotation ids differ as well.

    Returns:
        One annotation per class that occurs: `segmentation` as compressed run lengths, `bbox` as left, top, width and
        height in pixels, `area` in pixels.
    """
    height, width = ids.shape
    annotations = []
    for index, (left, top, right, bottom) in class_boxes(ids, len(names)).items():
        mask = ids == index
        annotations.append(
            {
                "id": (image_id - 1) * len(names) + index + 1,
                "image_id": image_id,
                "category_id": index,
                "segmentation": run_lengths(mask),
                "area": int(mask.sum()),
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
            }
        )
    return {
        "images": [{"id": image_id, "file_name": file_name, "width": width, "height": height}],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
    }


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask as COCO's compressed run lengths: column by column, runs of 0 and 1 in turn, as text.

    Args:
        mask: `(height, width)`, boolean.

    Returns:
        `{"size": [height, width], "counts": text}`.

    Source:
        The format of `rleToString`, common/maskApi.c in cocodataset/cocoapi: from the third run on, the difference
        to the run before the last; five bits a character, the sixth says that more follow, least significant first.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    # The first run is of zeros, if only of none.
    bounds = [*([0, 0] if flat.size and flat[0] else [0]), *changes.tolist(), flat.size]
    counts = np.diff(bounds)
    differences = counts.copy()
    differences[3:] -= counts[1:-2]
    text = []
    for value in differences.tolist():
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(bits + (32 if more else 0) + 48))
    return {"size": list(mask.shape), "counts": "".join(text)}


def geojson_file(ids: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Write a label map as a GeoJSON collection, one polygon per connected area of a class.

    Args:
        ids: `(height, width)`, class ids; those beyond `names`, such as 255, belong to no class.
        names: Names by class id.

    Returns:
        Features with `class`, `class_id` and `area` (pixels) as properties. Coordinates are pixels from the top left
        corner of the photograph, x to the right and y down: the pixel in row 0 and column 0 is the square from (0, 0)
        to (1, 1). Outlines follow the pixels' sides, so that drawing all polygons gives back the label map.
    """
    features = []
    for index in class_boxes(ids, len(names)):
        for polygon in polygons(ids == index):
            properties = {"class": names[index], "class_id": index, "area": round(sum(map(signed_area, polygon)))}
            geometry = {"type": "Polygon", "coordinates": polygon}
            features.append({"type": "Feature", "properties": properties, "geometry": geometry})
    return {"type": "FeatureCollection", "features": features}


def polygons(mask: np.ndarray) -> list[list[Ring]]:
    """Trace the outlines of a mask's areas; pixels that touch at a corner only belong to different ones.

    A corner of an outline lies where, of the four pixels around a point, one or three are inside (or two that touch
    only there, which makes two corners). From a corner, one side leads left or right and one up or down, so that
    corners in order along a row, and along a column, belong together in pairs. Following the pairs in turn gives
    closed rings.

    Args:
        mask: `(height, width)`, boolean.

    Returns:
        Per area its outer ring, then those of its holes. A ring is a list of [x, y] whose last point is the first
        again; outer rings have a positive `signed_area` and holes a negative one, as GeoJSON asks for.
    """
    x, y, horizontal, vertical = _corners(mask)
    count = len(x)
    by_row, by_column = np.lexsort((horizontal, x, y)), np.lexsort((vertical, y, x))
    beside, above = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    for partner, order in ((beside, by_row), (above, by_column)):
        partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]

    ring_of = np.full(count, -1)
    rings: list[list[int]] = []
    next_beside, next_above, seen = beside.tolist(), above.tolist(), [False] * count
    # By column: a ring is met first at the upper one of its leftmost corners.
    for start in by_column.tolist():
        if seen[start]:
            continue
        ring, corner = [], start
        while not seen[corner]:
            across = next_beside[corner]
            seen[corner] = seen[across] = True
            ring += [corner, across]
            corner = next_above[across]
        ring_of[ring] = len(rings)
        rings.append(ring)

    # Where the runs of inside pixels begin, and which outline begins them, tells which area a hole lies in.
    columns = np.where(mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1], np.arange(mask.shape[1]), 0)
    run_start = np.maximum.accumulate(columns, axis=1)
    upper = by_column[0::2]  # of each vertical side its upper end
    sides = x[upper] * (mask.shape[0] + 1) + y[upper]
    outer_of: list[int] = []
    areas: dict[int, list[Ring]] = {}
    for index, ring in enumerate(rings):
        left, top = int(x[ring[0]]), int(y[ring[0]])
        points = [[int(x[corner]), int(y[corner])] for corner in ring]
        points.append(points[0])
        is_outer = bool(mask[top, left])
        if (signed_area(points) > 0) != is_outer:
            points.reverse()
        if is_outer:
            outer_of.append(index)
        else:
            side = run_start[top, left - 1] * (mask.shape[0] + 1) + top
            # That outline lies further left, so that its own area is known.
            outer_of.append(outer_of[ring_of[upper[np.searchsorted(sides, side, side="right") - 1]]])
        areas.setdefault(outer_of[-1], []).append(points)
    return list(areas.values())


def _corners(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find x and y of all corners, and the directions, -1 or 1, of their sides: left or right, up or down."""
    padded = np.pad(mask, 1)
    quadrants = {(-1, -1): padded[:-1, :-1], (1, -1): padded[:-1, 1:], (-1, 1): padded[1:, :-1], (1, 1): padded[1:, 1:]}
    inside = sum(quadrant.astype(np.int8) for quadrant in quadrants.values())
    found = []
    for (right, down), quadrant in quadrants.items():
        opposite = quadrants[-right, -down]
        is_corner = ((inside == 1) & quadrant) | ((inside == 3) & ~quadrant) | ((inside == 2) & quadrant & opposite)
        rows, columns = np.nonzero(is_corner)
        found.append((columns, rows, np.full(len(rows), right), np.full(len(rows), down)))
    x, y, horizontal, vertical = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return x, y, horizontal, vertical


def signed_area(ring: Ring) -> float:
    """Return the area of a closed ring in pixels, positive where it runs from the x axis towards the y axis."""
    x, y = np.array(ring, dtype=np.float64).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def class_boxes(ids: np.ndarray, num_classes: int) -> dict[int, tuple[int, int, int, int]]:
    """Return (left, top, right, bottom) of every class that occurs, in pixels; right and bottom are excluded."""
    boxes = {}
    for index in np.unique(ids).tolist():
        if 0 <= index < num_classes:
            mask = ids == index
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            boxes[index] = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return boxes
