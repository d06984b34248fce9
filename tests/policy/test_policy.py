"""Policy: selectors, precedence, errors that help, plain data."""

from __future__ import annotations

import pickle

import pytest
import torch
import yaml
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_sketch import (
    SM3,
    BFloat16,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Policy,
    RowWise,
    Rule,
    compress,
    default_policy,
    plan,
)
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.policy.policy import as_policy
from tests.tiny import CASES, give_gradients


def make_model():
    return nn.ModuleDict({
        "small": nn.Embedding(20, 4), "big": nn.Embedding(200, 4),
        "mlp": nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4)), "head": nn.Linear(4, 50, bias=False),
    })  # fmt: skip


def matched(*rules, role_hints=None):
    """The number of the deciding rule by parameter, for those that have one."""
    model = make_model()
    policy = Policy(rules, role_hints=role_hints)
    layers = named_layers(model, role_hints)
    return {layers[key].fqn: rule + 1 for key, rule in policy.assign(layers).items()}


TABLES = {"small.weight", "big.weight"}
MLP = {"mlp.0.weight", "mlp.0.bias", "mlp.1.weight", "mlp.1.bias"}


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ({"role": "embedding"}, TABLES),
        ({"role": ("embedding", "other")}, TABLES | {"mlp.0.bias", "mlp.1.bias"}),
        ({"role": "embedding", "min_rows": 200}, {"big.weight"}),
        ({"min_rows": 21}, {"big.weight", "head.weight"}),
        ({"min_numel": 200}, {"big.weight", "head.weight"}),
        ({"name": "mlp.*"}, MLP),
        ({"name": "re:mlp.*weight$"}, {"mlp.0.weight", "mlp.1.weight"}),
        ({"name": ["big.*", "head.*"]}, {"big.weight", "head.weight"}),
        ({"sparse": False, "role": "embedding"}, TABLES),
        ({"module": nn.Embedding}, TABLES),
        ({"module": "Linear"}, MLP | {"head.weight"}),
        ({"module": nn.Linear, "role": "other"}, {"mlp.0.bias", "mlp.1.bias"}),
        ({"match": lambda fqn, module, param: param.ndim == 1}, {"mlp.0.bias", "mlp.1.bias"}),
        ({"match": lambda fqn, module, param: isinstance(module, nn.Linear) and fqn[0] == "h"}, {"head.weight"}),
        ({}, TABLES | MLP | {"head.weight"}),
    ],
    ids=lambda names: "+".join(sorted(names)) or "nothing",
)
def test_a_rule_takes_the_layers_that_all_its_selectors_match(selectors, expected):
    assert set(matched(Rule(**selectors, second_moment=RowWise()))) == expected


def test_a_module_matches_by_its_base_classes_too():
    class Table(nn.Embedding):
        pass

    model = Table(5, 2)
    for module in (Table, nn.Embedding, "Embedding", "Table"):
        assert Policy([Rule(module=module)]).assign(named_layers(model))


def test_match_is_asked_only_about_layers_that_fit_otherwise():
    asked = []
    matched(Rule(role="embedding", match=lambda fqn, module, param: not asked.append(fqn)))
    assert asked == ["small.weight", "big.weight"]


def test_the_first_rule_that_matches_decides_and_the_rest_is_kept():
    found = matched(Rule(name="big.*"), Rule(role="embedding"), Rule(name="mlp.0.*"))
    assert found == {"big.weight": 1, "small.weight": 2, "mlp.0.weight": 3, "mlp.0.bias": 3}


def test_hints_give_roles_to_select_by():
    assert matched(Rule(role="softmax"), role_hints={"head.weight": "softmax"}) == {"head.weight": 1}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [Rule(role="embedding", min_rows=10_000)],
            r"rule 1 \(role='embedding', min_rows=10_000\) matched no parameter; nearest is 'big.weight' with 200 rows "
            r"\(missed: min_rows\)",
        ),
        ([Rule(name="mlp.*", min_numel=1 << 20)], "nearest is 'mlp.0.weight' with 64 elements"),
        ([Rule(role="embedding"), Rule(name="bg.*")], r"rule 2 \(name='bg.\*'\) matched no parameter; nearest is 'big"),
        ([Rule(role="softmax")], r"nearest is 'big.weight' of role embedding, Embedding, shape \[200, 4\] \(missed: r"),
        (
            [Rule(role="embedding"), Rule(name="small.*", second_moment=SM3())],
            "rule 2 .* matched no parameter; nearest is 'small.weight', which an earlier rule takes first",
        ),
        ([Rule(name=["big.*", "mlp.*"], role="softmax", min_rows=5)], r"\(missed: role\)"),
        ([Rule(role="embedding", match=lambda *_: False)], r"nearest is 'big.weight' .* \(missed: match\)"),
        (
            [Rule(role="embedding", sparse=True)],
            r"sparse=True\) matched no parameter; nearest is 'big.weight' of modules without sparse=True \(missed: sp",
        ),
        ([Rule(module="Conv2d")], r"\(module='Conv2d'\) matched no parameter"),
        ([Rule(module=nn.Conv2d)], r"\(module=Conv2d\) matched no parameter"),
    ],
)
def test_a_rule_that_decides_nothing_is_an_error_that_names_what_came_nearest(rules, message):
    with pytest.raises(ValueError, match=message):
        matched(*rules)


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="the model has no parameters"):
        Policy([Rule()]).assign(named_layers(nn.Identity()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy([]), "needs at least one rule; to compress nothing, do not call compress"),
        (lambda: Policy([Rule(), Rule()]), r"rules \[1, 2\] have no selector: each claims to be the default"),
        (lambda: Policy([Rule(), Rule(role="other")]), "rule 1 has no selector and takes every layer; it must be"),
        (lambda: Rule(role="embeddings"), r"Rule\(role='embeddings'\): unknown role; roles are embedding, softmax"),
        (lambda: Rule(role=[]), r"Rule\(role=\(\)\): empty; leave it out to match any role"),
        (lambda: Rule(name=""), r"Rule\(name=''\): empty; leave it out to match any name"),
        (
            lambda: Policy([Rule()], role_hints="first"),
            r"role_hints='first': must map name patterns to roles, or be 'l",
        ),
        (lambda: Rule(min_rows=-1), r"Rule\(min_rows=-1\): must be >= 0"),
        (lambda: Rule(min_numel=-1), r"Rule\(min_numel=-1\): must be >= 0"),
        (lambda: Rule(sparse=1), r"Rule\(sparse=1\): must be True, False or None"),
        (lambda: Rule(optional=None), r"Rule\(optional=None\): must be True or False"),
        (lambda: Rule(exp_avg="Sketch"), "unknown codec 'Sketch'; known are BFloat16, CountSketch, Drop, "),
        (lambda: Rule(exp_avg={"compression": 3}), "{'compression': 3} is no codec: give an object as RowWise"),
        (lambda: Rule(exp_avg=RowWise), r"codec RowWise: give an object, RowWise\(\), or the name 'RowWise'"),
        (lambda: Rule(exp_avg=3), "3 is no codec: "),
        (lambda: Rule(exp_avg=["RowWise"]), r"\['RowWise'\] is no codec: "),
        (lambda: Rule(exp_avg={"RowWise": {"compression": 3}}), "is no codec: .* with the key 'codec'"),
        (lambda: Rule(role=3), r"Rule\(role=3\): must be a string, or a list of strings"),
        (lambda: Rule(name=["a", 3]), r"Rule\(name=\['a', 3\]\): must be a string, or a list of strings"),
        (lambda: Rule(match="foo"), r"Rule\(match='foo'\): must be a function of name, module and parameter"),
        (
            lambda: Policy(Rule(exp_avg="Drop")),
            r"Policy\(Rule\(exp_avg=Drop\(\)\)\): must be a list of rules, as",
        ),
        (lambda: Policy("embedding"), r"Policy\('embedding'\): must be a list of rules"),
        (lambda: Policy(3), r"Policy\(3\): must be a list of rules"),
        (lambda: Policy(["embedding"]), "'embedding' is no policy rule: must be a Rule, or a mapping of "),
        (
            lambda: as_policy(Rule(exp_avg="Drop")),
            r"policy=Rule\(exp_avg=Drop\(\)\): must be a Policy, as ",
        ),
        (lambda: as_policy(RowWise()), r"policy=RowWise\(.*\): must be a Policy"),
        (
            lambda: as_policy("9bit"),
            r"policy '9bit': neither a preset \(tables, .*, 8bit\) nor a .yaml file",
        ),
        (lambda: Rule(exp_avg_sq={"codec": "RowWise", "width": 3}), "codec RowWise: .*unexpected keyword argument"),
        (lambda: Rule(exp_avg_sq={"codec": "CountSketch", "depth": 0}), r"CountSketch\(depth=0\): must be >= 1"),
        (lambda: Policy([{"role": "other", "exp_avg_square": "SM3"}]), "a policy rule has no exp_avg_square; it has "),
        (
            lambda: Policy.from_dict({"rule": []}),
            r"a policy has the keys rules \(a list\), seed and role_hints; got \['rule'\]",
        ),
        (lambda: Policy.from_dict({"rules": None}), r"a policy has the keys rules \(a list\)"),
        (lambda: Rule(name="re:("), r"name='re:\(' is not a regular expression: "),
        (lambda: Rule(min_rows="10"), r"Rule\(min_rows='10'\): must be a whole number"),
        (lambda: Policy.from_dict({"rules": [{}], "sed": 1}), r"got \['rules', 'sed'\]"),
    ],
)
def test_what_is_no_policy_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


FULL = Policy(
    [
        Rule(role=("embedding", "softmax"), min_rows=30, exp_avg=Drop(), exp_avg_sq=CountSketch(depth=2, lazy=True)),
        Rule(name="re:^mlp", module="Linear", min_numel=4, first_moment=BFloat16(), second_moment=SM3("I")),
        Rule(second_moment=RowWise(compression=2)),
    ],
    seed=7,
    role_hints={"head.weight": "softmax"},
)


def test_plain_data_there_and_back():
    assert Policy.from_dict(FULL.to_dict()) == FULL
    assert eval(repr(FULL)) == FULL
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    assert Policy.from_dict(default_policy().to_dict()) == default_policy()


def test_a_class_becomes_its_name():
    rule = Rule(module=nn.Embedding, second_moment=RowWise())
    assert rule.to_dict()["module"] == "Embedding"
    assert Policy([rule.to_dict()]).assign(named_layers(make_model())).keys()


def test_a_function_cannot_become_data():
    with pytest.raises(ValueError, match="a rule with a match function cannot be written out"):
        Policy([Rule(match=lambda *_: True)]).to_dict()


YAML = """
rules:
  - role: [embedding, softmax]
    min_rows: 30
    exp_avg: Drop
    exp_avg_sq: {codec: CountSketch, depth: 2, lazy: true}
  - {name: "re:^mlp", module: Linear, min_numel: 4, first_moment: BFloat16, second_moment: {codec: SM3, variant: I}}
  - second_moment: {codec: RowWise, compression: 2}
seed: 7
role_hints: {head.weight: softmax}
"""


def test_yaml_says_the_same(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(YAML)
    policy = Policy.from_yaml(path)
    assert policy == Policy.from_yaml(str(path))
    assert policy.to_dict() == FULL.to_dict()
    model = make_model()
    optimizer = AdamW(model.parameters())
    assert str(plan(model, optimizer, policy)) == str(plan(model, optimizer, FULL))


def test_a_policy_may_be_given_by_its_file_or_a_preset_s_name(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(YAML)
    assert as_policy(path) == as_policy(str(path)) == Policy.from_yaml(path)
    assert as_policy("8bit") == Policy.preset("8bit")
    assert as_policy(None) == Policy.preset("tables")
    model = make_model()
    optimizer = compress(AdamW(model.parameters()), model, "8bit")
    assert optimizer.compression.policy == Policy.preset("8bit")
    with pytest.raises(OSError, match=r"missing\.yaml"):
        as_policy("missing.yaml")


def test_text_that_is_no_yaml(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("a: [b")
    with pytest.raises(ValueError, match=r"policy\.yaml is no YAML: while parsing"):
        Policy.from_yaml(path)


@pytest.mark.parametrize("text", ["", "- role: embedding"])
def test_yaml_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"policy.yaml: expected a mapping with the key 'rules', got \w+"):
        Policy.from_yaml(path)


def test_a_state_s_own_name_comes_before_the_generic_one():
    rule = Rule(role="embedding", exp_avg=BFloat16(), first_moment=Drop(), second_moment=SM3())
    assert rule.codec_for("exp_avg", signed=True) == BFloat16()
    assert rule.codec_for("grad_avg", signed=True) == Drop()
    assert rule.codec_for("exp_avg_sq", signed=False) == rule.codec_for("sum", signed=False) == SM3()
    assert Rule(exp_avg=Drop()).codec_for("exp_avg_sq", signed=False) == Keep()


OPTIMIZERS = {
    Adam: ({}, {"exp_avg": BFloat16(), "exp_avg_sq": SM3()}),
    Adagrad: ({}, {"sum": SM3()}),
    RMSprop: (
        {"momentum": 0.1, "centered": True},
        {"square_avg": SM3(), "grad_avg": BFloat16(), "momentum_buffer": BFloat16()},
    ),
    SGD: ({"momentum": 0.1}, {"momentum_buffer": BFloat16()}),
}


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_generic_names_serve_every_optimizer(cls):
    kwargs, expected = OPTIMIZERS[cls]
    model = make_model()
    policy = Policy([Rule(role="embedding", first_moment=BFloat16(), second_moment=SM3())])
    made = plan(model, cls(model.parameters(), lr=0.1, **kwargs), policy)
    assert made.layers[0].layer.codecs == expected


@pytest.mark.parametrize(
    ("cls", "kwargs", "codecs", "keeps"),
    [
        (Adagrad, {}, {"exp_avg_sq": "SM3"}, "gives codecs for exp_avg_sq, but this optimizer keeps sum"),
        (Adam, {}, {"sum": "SM3", "momentum_buffer": "Drop"}, "codecs for sum, momentum_buffer, .* exp_avg, exp"),
        (RMSprop, {}, {"grad_avg": "Drop"}, "but this optimizer keeps square_avg"),
        (SGD, {"momentum": 0.9}, {"second_moment": "SM3"}, "but this optimizer keeps momentum_buffer"),
        (SGD, {}, {"momentum_buffer": "BFloat16"}, r"but this optimizer keeps no state at all \(is momentum 0\?\)"),
    ],
)
def test_a_rule_that_names_only_another_optimizer_s_states_is_an_error(cls, kwargs, codecs, keeps):
    model = make_model()
    with pytest.raises(ValueError, match=rf"policy rule 1 \(role='embedding'\) .*{keeps}"):
        compress(cls(model.parameters(), lr=0.1, **kwargs), model, Policy([Rule(role="embedding", **codecs)]))


def test_a_rule_may_name_the_states_of_several_optimizers():
    model = make_model()
    policy = Policy([Rule(role="embedding", exp_avg_sq="SM3", sum="RowWise")])
    for cls, codec in ((Adam, SM3()), (Adagrad, RowWise())):
        assert codec in plan(model, cls(model.parameters()), policy).layers[0].layer.codecs.values()


@pytest.mark.parametrize("codec", ["RowWise", "SM3", "Factored"])
def test_a_codec_that_cannot_hold_a_first_moment_says_so(codec):
    model = make_model()
    with pytest.raises(ValueError, match=f"{codec} cannot hold exp_avg of small.weight: "):
        compress(Adam(model.parameters()), model, Policy([Rule(role="embedding", exp_avg=codec)]))


def test_a_second_moment_cannot_be_dropped():
    model = make_model()
    with pytest.raises(ValueError, match=r"Drop cannot hold exp_avg_sq of small.weight: .*plain SGD"):
        compress(Adam(model.parameters()), model, Policy([Rule(role="embedding", exp_avg_sq="Drop")]))


def test_a_layer_has_one_momentum():
    model = make_model()
    policy = Policy([Rule(role="embedding", exp_avg_sq=SM3(momentum=0.9))])
    with pytest.raises(ValueError, match=r"small.weight: SM3\(momentum=...\) is the layer's momentum, so exp_avg must"):
        compress(Adam(model.parameters()), model, policy)


def test_the_default_policy_takes_large_tables():
    model = nn.ModuleDict({
        "a": nn.Embedding(10_000, 2), "b": nn.Embedding(9_999, 2), "c": nn.Linear(2, 20_000),
        "d": nn.Embedding(10_000, 2, sparse=True), "e": nn.EmbeddingBag(9_999, 2, sparse=True),
    })  # fmt: skip
    made = plan(model, Adam(model.parameters()))
    assert {x.layer.fqn: dict(x.layer.codecs) for x in made.layers if x.layer.compressed} == {
        "a.weight": {"exp_avg": Drop(), "exp_avg_sq": Factored(floor=1.0)},
        "d.weight": {"exp_avg": Drop(), "exp_avg_sq": Factored(floor=1.0)},
    }
    assert plan(model, SGD(model.parameters(), momentum=0.9)).layers[0].layer.codecs == {"momentum_buffer": BFloat16()}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_default_policy_serves_every_optimizer(case, sparse):
    model = nn.Embedding(10_000, 2, sparse=sparse)
    optimizer = compress(case.make(model.parameters()), model)
    for step in range(2):
        give_gradients(model, step, sparse=sparse or case.sparse)
        optimizer.step()
    codecs = plan(model, optimizer).layers[0].layer.codecs
    expected = {"exp_avg": Drop(), "grad_avg": BFloat16(), "momentum_buffer": BFloat16()}
    assert codecs == {state: expected.get(state, Factored(floor=1.0)) for state in codecs}
    assert model.weight.isfinite().all()


def test_the_default_policy_on_a_model_without_large_tables_converts_and_warns(caplog):
    model = make_model()
    compress(Adam(model.parameters()), model)
    assert "the largest, big.weight, has 200" in caplog.text


def tied(*modules):
    for module in modules[1:]:
        module.weight = modules[0].weight
    return nn.ModuleList(modules)


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda: tied(nn.Embedding(6, 2, sparse=True)), torch.sparse_coo),
        (lambda: tied(nn.Embedding(6, 2, sparse=True), nn.Embedding(6, 2, sparse=True)), torch.sparse_coo),
        (lambda: tied(nn.Embedding(6, 2, sparse=True), nn.Linear(2, 6)), torch.strided),
        (lambda: tied(nn.Embedding(6, 2, sparse=True), nn.Embedding(6, 2)), torch.strided),
        (lambda: tied(nn.Embedding(6, 2), nn.Embedding(6, 2, sparse=True)), torch.strided),
        (lambda: tied(nn.Embedding(6, 2)), torch.strided),
    ],
    ids=["sparse", "two sparse", "sparse and a head", "sparse and dense", "dense and sparse", "dense"],
)
def test_sparse_selects_the_tables_whose_gradients_are_sparse(make, layout):
    model = make()
    uses = [m(torch.ones(2)) if isinstance(m, nn.Linear) else m(torch.tensor([1])) for m in model]
    sum(x.sum() for x in uses).backward()
    assert model[0].weight.grad.layout == layout
    layer = named_layers(model)[id(model[0].weight)]
    sparse = layout == torch.sparse_coo
    assert [Rule(sparse=s, exp_avg="Drop").misses(layer) for s in (sparse, None, not sparse)] == [[], [], ["sparse"]]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule(sparse=False, optional=True, exp_avg="Drop"), "Rule(sparse=False, exp_avg=Drop(), optional=True)"),
        (Rule(sparse=True), "Rule(sparse=True)"),
    ],
)
def test_sparse_and_optional_are_written_out(rule, text):
    assert repr(rule) == text
    assert eval(text) == rule
    assert Policy.from_dict(yaml.safe_load(yaml.safe_dump(Policy([rule]).to_dict()))) == Policy([rule])
    assert not rule.is_default
    assert rule.describe() == f"sparse={rule.sparse}"


def test_an_optional_rule_may_match_nothing():
    assert set(matched(Rule(name="no.such", optional=True), Rule(role="embedding"))) == TABLES


def test_the_seed_and_the_name_make_the_hash():
    model = make_model()
    seeds = {
        (seed, x.layer.fqn): x.layer.seed
        for seed in (0, 1)
        for x in plan(model, Adam(model.parameters()), Policy([Rule(exp_avg_sq="SM3")], seed=seed)).layers
    }
    assert len(set(seeds.values())) == len(seeds) == 14
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert torch.tensor(list(seeds.values())).dtype == torch.int64
