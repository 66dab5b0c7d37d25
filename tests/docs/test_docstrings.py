"""Docstrings say what the code does: arguments, defaults, sections, examples."""

import doctest
import importlib
import inspect
import pkgutil

import keras
import pytest

import keras_moe
from keras_moe import callbacks, dispatch, layers, models, optimizers, plots, routers, tuning
from keras_moe.models import features
from tests.docs import docstrings
from tests.docs.docstrings import UNSTATED

PUBLIC = [
    getattr(module, name)
    for module in (layers, routers, callbacks, dispatch, models, optimizers, plots, tuning)
    for name in module.__all__
]
PUBLIC += [keras_moe.record_routing, keras_moe.report]
PUBLIC += [features.Categorical, features.History, features.MultiHot, features.Numeric]
CLASSES = [each for each in PUBLIC if inspect.isclass(each)]
RECORDS = [each for each in CLASSES if issubclass(each, tuple)]
CONSTRUCTED = [each for each in CLASSES if each not in RECORDS]
FUNCTIONS = [each for each in PUBLIC if inspect.isfunction(each)]
KERAS_LAYERS = [each for each in CLASSES if issubclass(each, keras.layers.Layer)]
USER_LAYERS = [layers.MoE, layers.SwitchFFN, layers.SoftMoE, layers.MMoE, layers.ExpertMLP]
MODULES = [keras_moe.__name__] + [
    module.name
    for module in pkgutil.walk_packages(keras_moe.__path__, "keras_moe.")
    if ".integrations" not in module.name  # needs Keras 2: see test_pages.py
]

# A preset takes and returns what its parent does.
INHERITED = ("Call arguments", "Input shape", "Output shape", "Returns", "Raises")


def by_name(each: type) -> str:
    return each.__name__


def sections_with_inherited(cls: type) -> set[str]:
    """A preset documents its own arguments; shapes are those of the layer that it fills in."""
    own = set(docstrings.sections_of(cls))
    for base in cls.__mro__[1:]:
        if base in CLASSES:
            own |= set(docstrings.sections_of(base)) & set(INHERITED)
    return own


def arguments_of(each):
    """The parameters that a caller of a class or function passes."""
    if not inspect.isclass(each):
        return docstrings.signature_arguments(each)
    is_ours = getattr(each.__init__, "__module__", "").startswith("keras_moe")
    if not is_ours:  # none of its own
        return {}
    return docstrings.signature_arguments(each.__init__)


@pytest.mark.parametrize("each", CONSTRUCTED + FUNCTIONS, ids=by_name)
def test_every_argument_is_documented_and_exists(each):
    documented = docstrings.documented_arguments(each)
    documented = {name for name in documented if not name.startswith("*") and name != "name"}
    assert documented == set(arguments_of(each))


@pytest.mark.parametrize("each", CONSTRUCTED + FUNCTIONS, ids=by_name)
def test_documented_defaults_are_the_real_ones(each):
    documented = docstrings.documented_arguments(each)
    for name, parameter in arguments_of(each).items():
        claimed = documented[name].default
        if parameter.default is inspect.Parameter.empty:
            assert claimed is UNSTATED, f"`{name}` is required, and documented with a default."
        else:
            assert claimed is not UNSTATED, f"The default of `{name}` is not documented."
            assert (claimed, type(claimed)) == (parameter.default, type(parameter.default)), name


@pytest.mark.parametrize("cls", CONSTRUCTED, ids=by_name)
def test_forwarded_arguments_are_the_parents(cls):
    documented = docstrings.documented_arguments(cls)
    above = [base for base in cls.__mro__[1:] if base in CLASSES]  # a parent may forward too
    if "**kwargs" not in documented or not above:
        return
    parent = above[0]
    text = documented["**kwargs"].text
    assert f"`{parent.__name__}`" in text
    accepted = {name for base in above for name in docstrings.signature_arguments(base.__init__)}
    left = accepted - set(docstrings.signature_arguments(cls.__init__))
    is_exception, names = docstrings.forwarded_names(text)
    assert names <= accepted, names - accepted
    if is_exception:
        return
    between = [
        base for base in cls.__mro__ if "__init__" in vars(base) and issubclass(base, parent)
    ]
    sources = [inspect.getsource(base.__init__) for base in between if base is not parent]
    fixed = {rest.partition('"')[0] for source in sources for rest in source.split('kwargs["')[1:]}
    # What the constructor sets itself, by position or in kwargs, cannot be forwarded.
    assert names == left - fixed - {"top_k"}


@pytest.mark.parametrize("cls", CLASSES + FUNCTIONS, ids=by_name)
def test_summary_is_one_sentence_on_one_line(cls):
    summary, *rest = inspect.getdoc(cls).splitlines()
    assert summary.endswith(".")
    assert not rest or not rest[0]


@pytest.mark.parametrize("cls", KERAS_LAYERS, ids=by_name)
def test_layers_and_routers_say_how_to_call_them(cls):
    sections = sections_with_inherited(cls)
    assert "Args" in sections or not arguments_of(cls)
    assert "Call arguments" in sections
    assert sections & {"Returns", "Output shape"}


@pytest.mark.parametrize("cls", KERAS_LAYERS, ids=by_name)
def test_call_arguments_are_those_of_call(cls):
    described = next(
        docstrings.sections_of(base)["Call arguments"]
        for base in cls.__mro__
        if base in CLASSES and "Call arguments" in docstrings.sections_of(base)
    )
    names = {line.split(":")[0].strip() for line in described if line[4:5].strip() and ":" in line}
    if cls.call.__module__.startswith("keras_moe"):  # and not Keras's own
        assert names == set(docstrings.signature_arguments(cls.call))


@pytest.mark.parametrize("cls", USER_LAYERS, ids=by_name)
def test_user_layers_have_all_sections(cls):
    sections = sections_with_inherited(cls)
    expected = {"Args", "Call arguments", "Input shape", "Output shape", "Raises", "Example"}
    if cls is not layers.ExpertMLP:  # a bank has no paper, and one output of a known shape
        expected |= {"Returns", "Reference"}
    assert expected <= sections, expected - sections
    assert "Example" in docstrings.sections_of(cls), "An example cannot be inherited."


@pytest.mark.parametrize("cls", RECORDS, ids=by_name)
def test_records_document_their_fields(cls):
    described = [line for line in docstrings.sections_of(cls)["Attributes"] if line[4:5].strip()]
    assert [line.split(":")[0].strip() for line in described] == list(cls._fields)


@pytest.mark.parametrize("record", ["Routing", "SoftRouting", "GateRouting"])
def test_top_level_records_document_their_fields(record):
    test_records_document_their_fields(getattr(keras_moe, record))


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    results = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder()
    with_examples = [each for each in CLASSES if any(t.examples for t in finder.find(each))]
    assert set(USER_LAYERS) <= set(with_examples)
