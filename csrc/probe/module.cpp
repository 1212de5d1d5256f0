// Developers' module: the torch-free routines over NumPy arrays, for exhaustive tests. Never part of a wheel.
//
// A header bind_<name>.h hands over what <name>.cpp reaches, which is compiled once per instruction set.
#include <pybind11/pybind11.h>

#include "bind_key_histogram.h"
#include "bind_pairwise.h"
#include "bind_probability_bins.h"
#include "bind_run_length.h"
#include "bind_scalar.h"
#include "bind_select.h"
#include "bind_sorted_l1_steps.h"
#include "mlot/cpu/dispatch.h"

PYBIND11_MODULE(_probe, module) {
  const char* const names[] = {"default", "avx2", "avx512"};
  module.attr("capability") = names[static_cast<int>(mlot::isa())];
  mlot::bind_scalar(module);
  mlot::bind_select(module);
  mlot::bind_run_length(module);
  mlot::bind_key_histogram(module);
  mlot::bind_probability_bins(module);
  mlot::bind_sorted_l1_steps(module);
  mlot::bind_pairwise(module);
}
