// Element types that kernels read and write, and their conversion to and from float.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define ALIT_ANYWHERE __host__ __device__
#else
#define ALIT_ANYWHERE
#endif

namespace alit {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };

ALIT_ANYWHERE inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ALIT_ANYWHERE inline std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

ALIT_ANYWHERE inline float load(float value) { return value; }

ALIT_ANYWHERE inline float load(bfloat16 value) { return from_bits(static_cast<std::uint32_t>(value.bits) << 16); }

ALIT_ANYWHERE inline float load(float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  // Subnormal numbers are multiples of 2^-24; no subnormal float comes up, which a process may have the processor take for 0.
  const std::uint32_t subnormal = to_bits(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  const std::uint32_t normal = (magnitude << 13) + 0x38000000u;  // exponent and mantissa in place, another bias
  const std::uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  const std::uint32_t bits = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : finite;
  return from_bits(sign | bits);
}

// Rounds to nearest, ties to even.
template <typename T>
ALIT_ANYWHERE T store(float value);

template <>
ALIT_ANYWHERE inline float store<float>(float value) {
  return value;
}

template <>
ALIT_ANYWHERE inline bfloat16 store<bfloat16>(float value) {
  const std::uint32_t bits = to_bits(value);
  if (value != value) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
ALIT_ANYWHERE inline float16 store<float16>(float value) {
  const std::uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the lowest bits
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

// Calls body(T{}) with the C++ type of a type code.
template <typename Body>
void dispatch(Type type, const Body& body) {
  switch (type) {
    case Type::float32:
      return body(float{});
    case Type::bfloat16:
      return body(bfloat16{});
    case Type::float16:
      return body(float16{});
  }
  throw std::invalid_argument("type: unknown code " + std::to_string(static_cast<int>(type)));
}

}  // namespace alit
