"""Faults of the contract of a method: what is refused, what a trial looks at, arrays that places share, loading."""
from __future__ import annotations

from tests.planted.bug import Bug

METHOD, FIELDS, BUILD, TRIAL, LOAD = (
    f"attaching/{name}.py" for name in ("method", "fields", "build", "trial", "load"))
CONTRACT, FAULTS = "attaching/test_method.py::test_", "attaching/test_method_faults.py::test_"
UNREGISTERED = CONTRACT + "something_else_than_a_registered_method_is_refused"
FILE_HOLDS = CONTRACT + "a_field_that_a_file_cannot_hold_is_refused_with_what_is_expected"
ARRAYS = CONTRACT + "arrays_that_are_declared_wrongly_are_refused"
PLACES = CONTRACT + "places_that_are_none_of_this_model_are_refused"
DENSE = CONTRACT + "a_dense_that_fails_or_gives_something_else_is_refused"
ON_SITES = CONTRACT + "a_piece_for_a_site_that_gives_something_else_than_the_site_takes_is_refused"
REGISTER = CONTRACT + "register_refuses_a_class_that_could_not_be_attached_saved_or_loaded"
ONE_NAME = CONTRACT + "two_classes_of_one_name_are_refused_but_one_that_is_defined_again_takes_the_place_of_the_old"

BUGS = [
    # ---- which methods, with which fields
    Bug("a method that is not registered is attached, and no file of it can be loaded", METHOD,
        "    if METHODS.get(what) is not type(method):\n", "    if False:\n", UNREGISTERED),
    Bug("an object of a class that was defined again is attached", METHOD,
        "if METHODS.get(what) is not type(method):", "if what not in METHODS:", ONE_NAME),
    Bug("a second method of one name takes the place of the first", METHOD,
        "if known is not None and (known.__module__", "if False and (known.__module__", ONE_NAME),
    Bug("a method whose fields can change is registered", METHOD, "if parameters is None or not parameters.frozen:",
        "if parameters is None:", REGISTER),
    Bug("fields that JSON changes are accepted", METHOD, "        if again.get(name) != value:\n",
        "        if False:\n",
        CONTRACT + "a_post_init_that_does_not_call_the_contracts_is_refused_where_that_makes_a_difference"),
    Bug("infinity is a field that a file holds", FIELDS, "type(value) in (int, float) and is_number(value)",
        "type(value) in (int, float)", FILE_HOLDS),
    Bug("only the contract's own __post_init__ checks settings", METHOD,
        "    check_settings(method)  # again, for a __post_init__ that does not call this one\n", "",
        CONTRACT + "a_setting_is_checked_with_and_without_the_contracts_post_init"),
    # ---- which places and arrays
    Bug("a place of another model is taken for the one of its name", BUILD, "if known.get(name) is not place:",
        "if name not in known:", PLACES),
    Bug("a shared name that is a place is taken", BUILD, "if d.shared is not None and d.shared in known:", "if False:",
        ARRAYS),
    Bug("a shared array is trained at one place and fixed at another", BUILD,
        "if (first.shape, first.kind, first.dtype) != (d.shape, d.kind, d.dtype):", "if first.shape != d.shape:",
        CONTRACT + "a_shared_array_that_two_places_declare_differently_is_refused"),
    Bug("a shared array is drawn once for each place", METHOD, 'return f"{self.shared or place}.{leaf}"',
        'return f"{place}.{leaf}"',
        CONTRACT + "a_shared_array_that_is_trained_is_one_parameter_with_the_sum_of_all_gradients"),
    Bug("the declared dtype is ignored", BUILD, "numpy.dtype(d.dtype or self.places[name].dtype)",
        "numpy.dtype(self.places[name].dtype)",
        "methods/test_selective.py::test_only_what_is_masked_ever_differs_from_the_base"),
    Bug("pieces are made of copies of the arrays that are trained and saved", BUILD,
        "return {name: self.piece(name, own) for name in self.places}, own",
        "return {name: self.piece(name, {key: type(p)(p.data) for key, p in own.items()})\n"
        "                for name in self.places}, own",
        CONTRACT + "it_trains_its_own_arrays_and_nothing_else"),
    Bug("an init may give another shape", BUILD,
        "array.shape != declared.shape or array.dtype != dtype:", "array.dtype != dtype:", ARRAYS),
    Bug("the base's own array is trained in place of a copy of it", BUILD, "else array.copy()", "else array",
        FAULTS + "an_init_that_returns_the_base_does_not_let_training_write_into_it"),
    Bug("an init that raises has moved the generator", "attaching/attach.py",
        "        rng.bit_generator.state = before\n", "",
        CONTRACT + "an_init_that_raises_leaves_the_generator_where_it_was"),
    # ---- the trial
    Bug("the trial looks at no shape", TRIAL, 'if getattr(array, "shape", None) != shape or array.dtype != dtype:',
        "if array.dtype != dtype:", DENSE),
    Bug("the trial looks at no dtype", TRIAL, 'if getattr(array, "shape", None) != shape or array.dtype != dtype:',
        'if getattr(array, "shape", None) != shape:', DENSE),
    Bug("the trial makes no product", TRIAL,
        'yield "project(x)", _tensor("project(x)", weight.project(x, None)), (TIME, d_out), dtype', "pass",
        CONTRACT + "a_product_or_lookup_that_gives_something_else_than_dense_would_is_refused"),
    Bug("one place of a shape is tried, whatever arrays the others get", TRIAL,
        "tuple(sorted((leaf, d.shape) for leaf, d in leaves.items()))", "tuple(sorted(leaves))",
        CONTRACT + "each_shape_of_arrays_is_tried_not_only_the_first_of_a_shape_of_weight"),
    Bug("a Parameter inside an object of the piece is not found", TRIAL, "        else:\n            waiting +=",
        "        elif isinstance(value, Piece):\n            waiting +=",
        CONTRACT + "an_array_that_is_not_declared_is_found_wherever_the_piece_hides_it"),
    Bug("a declared array that the piece lacks is not missed", TRIAL, "        if id(array) not in held:\n",
        "        if False:\n", CONTRACT + "a_declared_array_that_the_piece_lacks_or_hides_is_refused"),
    Bug("a property of the piece hides a declared array", TRIAL,
        "        if getattr(piece, attribute, None) is not array:\n", "        if False:\n",
        CONTRACT + "a_declared_array_that_the_piece_lacks_or_hides_is_refused"),
    Bug("an input site is tried without a mask alone", TRIAL, "for mask in (None, xp.ones((BATCH, TIME), dtype=bool)):",
        "for mask in (None,):", ON_SITES),
    Bug("a keys and values site is tried without a bias alone", TRIAL,
        "for kept, bias in ((x, None), (x.data, _zeros(1, 1, TIME, TIME, dtype=dtype))):",
        "for kept, bias in ((x, None),):", ON_SITES),
    Bug("a product of arrays is taken for one of Tensors", TRIAL, "if not isinstance(found, Tensor):", "if False:",
        FAULTS + "a_product_that_is_no_tensor_is_refused_because_it_cuts_the_gradient"),
    Bug("fixed codes are tried as zeros", TRIAL, "zeros, computes=not choosing)", "zeros, computes=True)",
        FAULTS + "a_fixed_mask_that_says_how_many_are_trained_is_tried_as_it_is"),
    Bug("a merged weight may be anything", "attaching/merging.py",
        'if not all(hasattr(merged, name) for name in ("arrays", "project", "rows", "drops")):', "if False:",
        FAULTS + "a_merged_weight_that_does_not_fit_is_refused_before_anything_moves"),
    Bug("scales of a quantized base are trained and it counts as the same base", "attaching/trained_on.py",
        "p in others for place in host.places for p in", "p in () for place in host.places for p in",
        FAULTS + "a_base_of_codes_is_counted_saved_and_moved_and_trained_scales_are_another_base"),
    # ---- loading
    Bug("load draws before it reads", LOAD,
        '        return to_device(_fitting(f"{path}: {key}", tensors[key], dtype))\n',
        "        declared.init(declared.shape, dtype, numpy.random.default_rng(0))\n"
        '        return to_device(_fitting(f"{path}: {key}", tensors[key], dtype))\n',
        CONTRACT + "load_calls_no_init"),
    Bug("load does not try the method of a file", LOAD, "        tried(plan)\n", "        pass\n",
        CONTRACT + "a_file_whose_method_fails_by_now_is_refused_with_the_place"),
]
