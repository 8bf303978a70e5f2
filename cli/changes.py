"""Two schemas of a model, the published one and the next -> what would break a program that calls it.

Reads what any Cog wrote: the published one may be another model's, with files, lists or choices.
"""

from typing import Any

from llm.words import one_line

Schema = dict[str, Any]

_TYPES = {"string": "texto", "integer": "entero", "number": "número", "boolean": "sí o no", "object": "objeto"}

# Each limit's name in Spanish, and the sign of a change that makes it stricter.
_LIMITS = {
    "minimum": ("mínimo", 1),
    "maximum": ("máximo", -1),
    "minLength": ("mínimo de caracteres", 1),
    "maxLength": ("máximo de caracteres", -1),
}


def breaking(old: Schema, new: Schema) -> list[str]:
    """A line in Spanish for each change: an input that is no longer accepted, or an output of another form."""
    before, after = _inputs(old), _inputs(new)
    lines = []
    for name, was in before.items():
        if name in after:
            differences = _narrower(was, after[name])
        else:
            renamed = [other for other in after if other not in before and _alike(was, after[other])]
            differences = [f"desaparece (¿ahora es {' o '.join(renamed)}?)" if renamed else "desaparece"]
        lines += [f"{one_line(name)}: {change}" for change in differences]
    for name in sorted(_required(new) - _required(old)):
        lines.append(f"{name}: {'pasa a ser obligatoria' if name in before else 'es nueva y obligatoria'}")

    answered, will_be = _output(_component(old, "Output")), _output(_component(new, "Output"))
    if answered != will_be:
        lines.append(f"la salida: era {answered} y será {will_be}")
    if _streams(old) and not _streams(new):
        lines.append("la salida: ya no se podrá leer a medida que llega")
    return lines


def _component(schema: Schema, name: str) -> Schema:
    component: Schema = schema.get("components", {}).get("schemas", {}).get(name, {})
    return component


def _required(schema: Schema) -> set[str]:
    return set(_component(schema, "Input").get("required", []))


def _inputs(schema: Schema) -> dict[str, Schema]:
    """Each input's schema. Cog keeps choices in a component of their own, which is merged into the input's."""
    inputs = {}
    for name, prop in _component(schema, "Input").get("properties", {}).items():
        for part in prop.get("allOf", []):
            prop = {**_component(schema, part.get("$ref", "").rpartition("/")[2]), **prop}
        inputs[name] = prop
    return inputs


def _alike(old: Schema, new: Schema) -> bool:
    """Whether these may be one input under two names."""
    equal = {key for key in ("description", "x-order") if key in old and old[key] == new.get(key)}
    return bool(equal) and _type(old) == _type(new)


def _narrower(old: Schema, new: Schema) -> list[str]:
    was, will = _type(old), _type(new)
    if (was, will) not in ((was, was), ("entero", "número")):
        return [f"era {was} y será {will}"]
    lines = []
    for key, (limit, sign) in _LIMITS.items():
        if key in new and key not in old:
            lines.append(f"no tenía {limit} y será {_shown(new[key])}")
        elif key in new and sign * (new[key] - old[key]) > 0:
            lines.append(f"el {limit} era {_shown(old[key])} y será {_shown(new[key])}")
    if "enum" in new:
        gone = [choice for choice in old.get("enum", []) if choice not in new["enum"]]
        if "enum" not in old:
            lines.append(f"solo admitirá {', '.join(map(_shown, new['enum']))}")
        elif gone:
            lines.append(f"dejará de admitir {', '.join(map(_shown, gone))}")
    return lines


def _type(prop: Schema) -> str:
    if "anyOf" in prop:
        return " o ".join(sorted(_type(variant) for variant in prop["anyOf"]))
    if prop.get("format") == "uri":
        return "archivo"
    if prop.get("type") == "array":
        return f"lista de {_type(prop.get('items', {}))}"
    return _TYPES.get(prop.get("type", ""), "cualquier cosa")


def _output(schema: Schema) -> str:
    if schema.get("x-cog-array-type") != "iterator":
        return _type(schema)
    of = _type(schema.get("items", {}))
    return f"{of} a trozos" if schema.get("x-cog-array-display") == "concatenate" else f"{of}, uno tras otro"


def _streams(schema: Schema) -> bool:
    return bool(schema.get("paths", {}).get("/predictions", {}).get("post", {}).get("x-cog-streaming"))


def _shown(value: Any) -> str:
    """A limit or a choice: 100000, 0,5, "texto"."""
    if isinstance(value, str):
        return f'"{one_line(value)}"'
    return str(int(value) if value == int(value) else value).replace(".", ",")
