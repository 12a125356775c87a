// The exponential of a vector of float32. No guard: included within the unnamed namespace of files that are compiled for
// one instruction set each, behind their vectors of floats F and of unsigned integers I, and read<T>(address).

// exp(x) for x <= 88, within 2^-23 of the value; 0 below -86.6, where the result would near the subnormal numbers.
inline F exponential(F x) {
  constexpr float kMagic = 0x1.8p23f;  // its sum with a small number has the nearest integer in the lowest bits
  const F t = x * 1.44269504f + kMagic;
  const F n = t - kMagic;
  const F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // log(2) in two parts; the first has 15 bits, so n * it is exact
  // exp(r) = 1 + r + r^2 g(r) for |r| <= log(2) / 2, g by interpolation in Chebyshev's points: relative error 1e-8.
  F g = r * 0.0013926176f + 0.0083631733f;
  g = g * r + 0.041666556f;
  g = g * r + 0.16666578f;
  g = g * r + 0.5f;
  const F y = g * (r * r) + r + 1.0f;
  I bits = read<I>(&t);
  bits = (bits + 127u) << 23;
  return x < -86.6f ? F{} : y * read<F>(&bits);
}
