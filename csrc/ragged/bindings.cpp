// Python bindings of the ragged ops. Addresses and strides (bytes) come as integers; Python allocates.

#include <cstddef>

#include "../bindings.h"
#include "ragged.h"

namespace {

using namespace alit::ragged;
using alit::Address, alit::at;

Rows packed(Address data, Size row_bytes) { return {at<const std::byte>(data), row_bytes}; }

Padded padded(Address data, Size sequence_stride, Size row_stride) {
  return {at<const std::byte>(data), sequence_stride, row_stride};
}

Lengths lengths_of(Address values, Size bytes) { return {at<const void>(values), bytes}; }

}  // namespace

void bind_ragged(py::module_& module) {
  const auto define = [&](const char* name, auto function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  define("cumulative_offsets", [](Address lengths, Size length_bytes, Size sequences, Address offsets) {
    cumulative_offsets(lengths_of(lengths, length_bytes), sequences, at<Offset>(offsets));
  });
  define("pack", [](Address data, Size sequence_stride, Size row_stride, Size length, Address lengths, Size length_bytes,
                    Size sequences, Address out, Address offsets, Size capacity, Size row_bytes, int threads) {
    cumulative_offsets(lengths_of(lengths, length_bytes), sequences, at<Offset>(offsets));
    pack(padded(data, sequence_stride, row_stride), length, at<const Offset>(offsets), sequences, at<std::byte>(out),
         capacity, row_bytes, threads);
  });
  define("unpack_backward", [](Address grad, Size sequence_stride, Size row_stride, Size length, Address offsets,
                               Size sequences, Address out, Size rows, Size row_bytes, int threads) {
    pack(padded(grad, sequence_stride, row_stride), length, at<const Offset>(offsets), sequences, at<std::byte>(out), rows,
         row_bytes, threads);
  });
  define("unpack", [](Address data, Size row_stride, Size rows, Address offsets, Size sequences, Address fill,
                      Size element_bytes, Address out, Size max_length, Size row_bytes, int threads) {
    unpack(packed(data, row_stride), rows, at<const Offset>(offsets), sequences, at<const std::byte>(fill),
           element_bytes, at<std::byte>(out), max_length, row_bytes, threads);
  });
  define("compact", [](Address data, Size row_stride, Size rows, Address offsets, Size sequences, Address keep,
                       Address out, Address new_offsets, Address source_row, Address target_row, Size capacity,
                       Size row_bytes, int threads) {
    compact(packed(data, row_stride), rows, at<const Offset>(offsets), sequences, at<const std::uint8_t>(keep),
            at<std::byte>(out), at<Offset>(new_offsets), at<Offset>(source_row), at<Offset>(target_row), capacity,
            row_bytes, threads);
  });
  define("compact_backward", [](Address grad, Size row_stride, Size capacity, Address target_row, Address out, Size rows,
                                Size row_bytes, int threads) {
    compact_backward(packed(grad, row_stride), capacity, at<const Offset>(target_row), at<std::byte>(out), rows, row_bytes,
                     threads);
  });
  define("append", [](Address data, Size row_stride, Size rows, Address offsets, Size sequences, Address fresh,
                      Size fresh_sequence_stride, Size fresh_row_stride, Size added, Address select, Address out,
                      Address new_offsets, Size capacity, Size row_bytes, int threads) {
    append(packed(data, row_stride), rows, at<const Offset>(offsets), sequences,
           padded(fresh, fresh_sequence_stride, fresh_row_stride), added, at<const std::uint8_t>(select),
           at<std::byte>(out), at<Offset>(new_offsets), capacity, row_bytes, threads);
  });
  define("append_backward", [](Address grad, Size row_stride, Size capacity, Address offsets, Address new_offsets,
                               Size sequences, Address select, Address grad_packed, Size rows, Address grad_fresh,
                               Size added, bool shared, Size row_bytes, int type, int threads) {
    append_backward(packed(grad, row_stride), capacity, at<const Offset>(offsets),
                    at<const Offset>(new_offsets), sequences, at<const std::uint8_t>(select),
                    at<std::byte>(grad_packed), rows, at<std::byte>(grad_fresh), added, shared, row_bytes,
                    static_cast<alit::Type>(type), threads);
  });
  define("tail_mask", [](Address tokens, Size sequence_stride, Size row_stride, Address lengths, Size length_bytes,
                         Size sequences, Size length, Address fill, Address out, Size row_bytes, int threads) {
    tail_mask(padded(tokens, sequence_stride, row_stride), lengths_of(lengths, length_bytes), sequences, length,
              at<const std::byte>(fill), at<std::byte>(out), row_bytes, threads);
  });
  define("tail_mask_backward", [](Address grad, Size sequence_stride, Size row_stride, Address lengths, Size length_bytes,
                                  Size sequences, Size length, Address grad_tokens, Address grad_fill, Size row_bytes,
                                  int type, int threads) {
    tail_mask_backward(padded(grad, sequence_stride, row_stride), lengths_of(lengths, length_bytes), sequences, length,
                       at<std::byte>(grad_tokens), at<std::byte>(grad_fill), row_bytes, static_cast<alit::Type>(type),
                       threads);
  });
}
