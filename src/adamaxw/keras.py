"""AdamaxW as an optimizer of Keras 3, on its JAX backend; `import adamaxw` does not import it."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from adamaxw._optimizer import adamaxw
from adamaxw._state import AdamaxState

# Attributes and arguments of the constructor.
_FORMATS = ("moment_dtype", "param_rounding", "scale_decay_by_lr")
_OWN = ("beta_1", "beta_2", "epsilon", *_FORMATS)


@keras.saving.register_keras_serializable(package="adamaxw")
class Adamaxw(keras.optimizers.Optimizer):
    """`adamaxw.adamaxw` for `compile` and `fit`.

    The leaves of its state are variables of the optimizer, saved bit for bit by `save_weights` and
    `save`; import this module before `load_model`. The count of the state is the number of updates
    done, whereas schedules count batches, as always in Keras.

    Keras accumulates gradients, averages variables (`use_ema`) and constrains them in the dtype of
    the variable. With `param_rounding="exact"`, what it writes to a bfloat16 variable is kept to
    within half a step of bfloat16.

    Args:
        learning_rate: a float, which may be assigned at any time, as `ReduceLROnPlateau` does; a
            schedule of Keras; or a function without arguments.
        beta_1: `b1` of `adamaxw.adamaxw`, a float.
        beta_2: `b2`, a float.
        epsilon: `eps`, a float.
        weight_decay: a float; None is 0.
        moment_dtype: as in `adamaxw.adamaxw`.
        param_rounding: likewise, for variables that are bfloat16 or float16, as with the dtype
            policy "bfloat16"; those of "mixed_bfloat16" are float32.
        scale_decay_by_lr: likewise.
        excluded: which variables do not decay: regular expressions for their names and paths, and
            indices among those that train.
        name: of the optimizer.
        **kwargs: other arguments of `keras.optimizers.Optimizer`, such as `clipnorm`.

    Raises:
        RuntimeError: the backend of Keras is not JAX.
        TypeError, ValueError: as from `adamaxw.adamaxw` and `keras.optimizers.Optimizer`.

    Examples:
        >>> import adamaxw.keras
        >>> import keras
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> optimizer = adamaxw.keras.Adamaxw(1e-2, moment_dtype="uint8")
        >>> optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        >>> model.compile(optimizer, loss="mse")
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = 1e-4,
        *,
        moment_dtype: Any = None,
        param_rounding: str = "nearest",
        scale_decay_by_lr: bool = True,
        excluded: Sequence[str | int] = (),
        name: str = "adamaxw",
        **kwargs: Any,
    ):
        if keras.backend.backend() != "jax":
            backend = keras.backend.backend()
            raise RuntimeError(f"Keras uses {backend!r}: set KERAS_BACKEND=jax before its import")
        super().__init__(learning_rate, weight_decay, name=name, **kwargs)
        self.beta_1, self.beta_2, self.epsilon = float(beta_1), float(beta_2), float(epsilon)
        self.weight_decay = None if weight_decay is None else float(weight_decay)
        self.moment_dtype = moment_dtype
        self.param_rounding = param_rounding
        self.scale_decay_by_lr = scale_decay_by_lr
        self.excluded = [excluded] if isinstance(excluded, str) else list(excluded)
        self._transformation(learning_rate)  # checks the arguments
        self.moment_dtype = None if moment_dtype is None else jnp.dtype(moment_dtype).name

    def _transformation(self, learning_rate: Any, mask: Any = None) -> Any:
        numbers = (self.beta_1, self.beta_2, self.epsilon, self.weight_decay or 0.0)
        formats = {name: getattr(self, name) for name in _FORMATS}
        return adamaxw(learning_rate, *numbers, mask, **formats)

    def build(self, variables: list[Any]) -> None:
        """Adds a variable for each leaf of the state."""
        if self.built:
            return
        state = self._transformation(0.0).init([v.value for v in variables])
        super().build(variables)
        # By index, because loading creates other variables.
        self.excluded += [i for i, v in enumerate(variables) if not self._use_weight_decay(v)]
        names = [x for x in self.excluded if isinstance(x, str)]
        self._decays = [
            i not in self.excluded
            and not any(re.search(name, x) for name in names for x in (v.name, v.path))
            for i, v in enumerate(variables)
        ]
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(state)
        self._leaves = []
        for (field, *index), leaf in leaves:
            name, layout = field.name, None
            if index:  # named as by Keras's own optimizers
                variable = variables[index[0].idx]
                name = f"{variable.path.replace('/', '_')}_{name}"
                layout = variable._layout if leaf.shape == variable.shape else None
            made = self.add_variable(leaf.shape, "zeros", leaf.dtype.name, layout=layout, name=name)
            made.assign(leaf)
            self._leaves.append(made)

    @property
    def state(self) -> AdamaxState:
        """The state of a built optimizer for `adamaxw.moments`; params are the list of values."""
        return self._treedef.unflatten([v.value for v in self._leaves])

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        """One step. Keras leaves out variables without a gradient."""
        variables = self._trainable_variables
        pairs = zip(trainable_variables, grads, strict=True)
        found = {self._get_variable_index(v): g for v, g in pairs}
        gradients = [found.get(i) for i in range(len(variables))]
        params = [v.value for v in variables]
        lr = keras.ops.cast(learning_rate, jnp.result_type(float).name)
        opt = self._transformation(lr, list(self._decays))  # a TrackedList is a leaf for JAX
        updates, state = opt.update(gradients, self.state, params)
        for variable, p, update in zip(variables, params, updates, strict=True):
            if update is not None:
                self.assign(variable, p + update)
        for variable, leaf in zip(self._leaves, jax.tree.leaves(state), strict=True):
            self.assign(variable, leaf)

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Chooses which variables do not decay, as in Keras; replaces `excluded`.

        Args:
            var_list: variables, or their indices among those that train.
            var_names: regular expressions that are searched for in names and paths of variables.
        """
        if self.built:  # Keras checks an attribute that it never sets.
            raise ValueError("exclude_from_weight_decay must be called before build")
        listed = var_list or ()
        super().exclude_from_weight_decay([x for x in listed if not isinstance(x, int)])
        names = [var_names] if isinstance(var_names, str) else var_names or ()
        self.excluded = [*names, *(x for x in listed if isinstance(x, int))]

    def _apply_weight_decay(self, variables: Any) -> None:
        """Does nothing: the update step decays."""

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        own = {name: getattr(self, name) for name in _OWN}
        return super().get_config() | own | {"excluded": list(self.excluded)}
