// Functions of the module that are called more often than a pybind11 function has time for.
#pragma once

#include <pybind11/pybind11.h>

#include <new>

namespace seqkernels {

namespace py = pybind11;

inline int thread_count(py::handle object) {
  const long threads = PyLong_AsLong(object.ptr());
  if (threads == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return static_cast<int>(threads > 1 << 30 ? 1 << 30 : threads);
}

// A function of exactly `kCount` positional arguments, called without what a pybind11 function does for each of them,
// which takes as long as the step.
template <void (*function)(PyObject* const*), Py_ssize_t kCount>
PyObject* positional(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "expected %zd positional arguments, got %zd", kCount, count);
    return nullptr;
  }
  try {
    function(args);
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <void (*function)(PyObject* const*), Py_ssize_t kCount>
void define(py::module_& m, const char* name, const char* doc) {
  static PyMethodDef method = {
      name,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&positional<function, kCount>)),
      METH_FASTCALL,
      doc,
  };
  const py::object module = m.attr("__name__");
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, module.ptr()));
}

}  // namespace seqkernels
