"""Finds out whether a chat template takes the content of a message as one text or in parts.

The rule is vLLM's: a template with a loop over the content of a message takes parts, and any other
template takes one text. Variables to which a template assigns messages or contents are followed.
"""

from typing import Any

from jinja2 import nodes


def reads_parts(tree: nodes.Template) -> bool:
    """Whether the template goes through the parts of a content."""
    loops = list(tree.find_all(nodes.For))
    lists = _with_aliases(tree, {"messages"})
    messages = {
        loop.target.name
        for loop in loops
        if isinstance(loop.target, nodes.Name) and _name(loop.iter) in lists
    }
    messages = _with_aliases(tree, messages)
    contents = {
        assigned.target.name
        for assigned in tree.find_all(nodes.Assign)
        if isinstance(assigned.target, nodes.Name) and _is_content(assigned.node, messages)
    }
    contents = _with_aliases(tree, contents)
    return any(
        _is_content(loop.iter, messages) or _name(loop.iter) in contents for loop in loops
    ) or _macro_reads_parts(tree, messages, contents)


def with_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text parts as one text, a line each, as in vLLM."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _macro_reads_parts(tree: nodes.Template, messages: set[str], contents: set[str]) -> bool:
    """Whether a content is passed to a macro that loops over its argument."""
    loops_over: dict[str, list[bool]] = {}  # for each macro, whether it does so by parameter
    for macro in tree.find_all(nodes.Macro):
        looped = {_name(loop.iter) for loop in macro.find_all(nodes.For)}
        loops_over[macro.name] = [parameter.name in looped for parameter in macro.args]
    return any(
        reads and (_is_content(given, messages) or _name(given) in contents)
        for call in tree.find_all(nodes.Call)
        for reads, given in zip(loops_over.get(_name(call.node), ()), call.args, strict=False)
    )


def _with_aliases(tree: nodes.Template, names: set[str]) -> set[str]:
    """The names, and the names of variables that are set to the value of one of them."""
    aliases: dict[str, list[str]] = {}
    for each in tree.find_all(nodes.Assign):
        if isinstance(each.target, nodes.Name):
            aliases.setdefault(_name(each.node), []).append(each.target.name)
    found, waiting = set(names), list(names)
    while waiting:
        new = set(aliases.get(waiting.pop(), ())) - found
        found |= new
        waiting.extend(new)
    return found


def _plain(node: nodes.Node | None) -> nodes.Node | None:
    """The expression that filters, tests and slices are applied to."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _name(node: nodes.Node | None) -> str:
    """The variable that an expression reads, or nothing."""
    node = _plain(node)
    return node.name if isinstance(node, nodes.Name) else ""


def _is_content(node: nodes.Node | None, messages: set[str]) -> bool:
    """Whether an expression reads the content of a message, one of these variables."""
    node = _plain(node)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content" and _name(node.node) in messages
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == "content"
        and _name(node.node) in messages
    )
