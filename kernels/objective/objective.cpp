// The objective and its gradient on a CPU. kernels/objective.py is the specification.
//
// Work is split by plane (n, c) and by image; each writes its own partial result and these are added in one order, so the
// outcome does not depend on the number of threads. Compiled without contraction: fused multiply-adds are written out.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

constexpr int WINDOW = 11, BORDER = WINDOW - 1;
constexpr float C1 = 0.01 * 0.01, C2 = 0.03 * 0.03;
// Rows of tiles are computed whole, whatever part of them is in the image, so that loops have constant lengths and no tails.
constexpr int TILE_ROWS = 32, TILE_COLUMNS = 64, PITCH = TILE_COLUMNS + 16;
using Row = float[PITCH];

struct Settings {  // mirrors kernels/native.py; every field has 8 bytes
    int64_t images, channels, height, width;
    // Strides of x, of the reconstruction and of its gradient, in elements; images are dense.
    int64_t x_plane, x_pixel, y_plane, y_pixel;
    double reconstruction, ssim, l2, focal, gamma, kl, rho;
    int64_t pixel_kl, reverse_kl;
};

// e^(−k²/2σ²), σ = 1.5, normalised. Compile-time constants: loads of a table would have to be repeated after every store.
struct Gaussian {
    float tap[WINDOW] = {};
    constexpr Gaussian() {
        constexpr double half[] = {0.0038659201394728076, 0.028565500784550377, 0.1353352832366127,
                                   0.41111229050718745, 0.8007374029168081, 1.0};
        double sum = half[5];
        for (int k = 0; k < 5; ++k) sum += 2 * half[k];
        for (int k = 0; k < WINDOW; ++k) tap[k] = float(half[k < 5 ? k : BORDER - k] / sum);
    }
};
constexpr Gaussian GAUSSIAN;

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Σ_k g_k · row[k · stride]
inline float blur(const float* row, int64_t stride) {
    float sum = GAUSSIAN.tap[0] * row[0];
#pragma GCC unroll 11
    for (int k = 1; k < WINDOW; ++k) sum = fma(GAUSSIAN.tap[k], row[k * stride], sum);
    return sum;
}

// ---- Reconstruction: SSIM and L2 (Eq 3.3) --------------------------------------------------------------------------------

// One thread's memory: copies of the planes of x and X̂ where those are not contiguous, and the three maps of the gradient
// with a border of zeros, so that the adjoint of a valid blur is a valid blur (its taps are symmetric). All of it, and each row
// of the maps, starts at a multiple of 64 bytes.
struct Scratch {
    float *x, *y, *maps[3];
    int64_t pitch;  // of the maps

    static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }
    static int64_t floats(int64_t height, int64_t width) {
        // Rows are read a little past the end of the last map.
        return 2 * rounded(height * width) + 3 * (height + BORDER) * rounded(width + BORDER) + PITCH;
    }
    Scratch(float* memory, int64_t height, int64_t width) : x(memory), pitch(rounded(width + BORDER)) {
        const int64_t plane = rounded(height * width), map = (height + BORDER) * pitch;
        y = x + plane;
        for (int m = 0; m < 3; ++m) maps[m] = y + plane + m * map;
        std::memset(maps[0], 0, (3 * map + PITCH) * sizeof(float));
    }
};

const float* contiguous(const float* plane, int64_t stride, int64_t length, float* copy) {
    if (stride == 1) return plane;
    if (stride == 3) {  // a constant stride is vectorised
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) copy[i] = plane[3 * i];
    } else
        for (int64_t i = 0; i < length; ++i) copy[i] = plane[stride * i];
    return copy;
}

struct Plane {
    const float *x, *y;
    int64_t height, width;
    float centre_x, centre_y;  // means
    double square_error;       // Σ (X̂ − x)²
};

Plane measure(const float* x, const float* y, int64_t height, int64_t width) {
    double sum_x = 0, sum_y = 0, square_error = 0;
    for (int64_t i = 0; i < height; ++i) {
        float row_x = 0, row_y = 0, row_square = 0;
#pragma omp simd reduction(+ : row_x, row_y, row_square)
        for (int64_t j = i * width; j < (i + 1) * width; ++j) {
            row_x += x[j], row_y += y[j];
            row_square = fma(y[j] - x[j], y[j] - x[j], row_square);
        }
        sum_x += row_x, sum_y += row_y, square_error += row_square;
    }
    const double pixels = double(height * width);
    return {x, y, height, width, float(sum_x / pixels), float(sum_y / pixels), square_error};
}

// Σ (1 − SSIM) over the plane's valid windows. With s = x + y and d = x − y, the blurs of s, d, s² and d² give every
// moment, V = var x + var y = (var s + var d)/2 and 2 cov = (var s − var d)/2, so that SSIM = l·c with
//     1 − l = 1 − (2 μ_x μ_y + C1)/(μ_x² + μ_y² + C1) = δ²/(μ_x² + μ_y² + C1),  δ = μ_x − μ_y
//     1 − c = 1 − (2 cov + C2)/(V + C2)               = var d/(V + C2)
// which is exact near 0. Each tile is centred on its own means: variances do not change, and fp32 does not cancel.
// Leaves the maps that ``gradient`` needs.
template <bool gradients>
double dissimilarity(const Plane& p, Scratch& scratch) {
    alignas(64) Row s[TILE_ROWS + BORDER] = {}, d[TILE_ROWS + BORDER] = {}, blurred[4], lost, q[3];
    double total = 0;
    for (int64_t top = 0; top < p.height - BORDER; top += TILE_ROWS)
        for (int64_t left = 0; left < p.width - BORDER; left += TILE_COLUMNS) {
            const int rows = int(std::min<int64_t>(TILE_ROWS, p.height - BORDER - top));
            const int columns = int(std::min<int64_t>(TILE_COLUMNS, p.width - BORDER - left));
            const float *x = p.x + top * p.width + left, *y = p.y + top * p.width + left;

            float sum_x = 0, sum_y = 0;
            for (int i = 0; i < rows + BORDER; ++i)
#pragma omp simd reduction(+ : sum_x, sum_y)
                for (int j = 0; j < columns + BORDER; ++j) sum_x += x[i * p.width + j], sum_y += y[i * p.width + j];
            const float area = float((rows + BORDER) * (columns + BORDER)), centre_x = sum_x / area, centre_y = sum_y / area;
            for (int i = 0; i < rows + BORDER; ++i)
#pragma omp simd
                for (int j = 0; j < columns + BORDER; ++j) {
                    const float a = x[i * p.width + j] - centre_x, b = y[i * p.width + j] - centre_y;
                    s[i][j] = a + b, d[i][j] = a - b;
                }
            // The gradient's maps are relative to the centre of the plane.
            const float shift_s = (centre_x - p.centre_x) + (centre_y - p.centre_y);
            const float shift_d = (centre_x - p.centre_x) - (centre_y - p.centre_y);

            for (int i = 0; i < rows; ++i) {
#pragma omp simd
                for (int j = 0; j < PITCH; ++j) {
                    float mean_s = 0, mean_d = 0, square_s = 0, square_d = 0;
#pragma GCC unroll 11
                    for (int k = 0; k < WINDOW; ++k) {
                        const float g_s = GAUSSIAN.tap[k] * s[i + k][j], g_d = GAUSSIAN.tap[k] * d[i + k][j];
                        mean_s += g_s, mean_d += g_d;
                        square_s = fma(g_s, s[i + k][j], square_s), square_d = fma(g_d, d[i + k][j], square_d);
                    }
                    blurred[0][j] = mean_s, blurred[1][j] = mean_d, blurred[2][j] = square_s, blurred[3][j] = square_d;
                }
#pragma omp simd
                for (int j = 0; j < TILE_COLUMNS; ++j) {
                    const float mean_s = blur(blurred[0] + j, 1), mean_d = blur(blurred[1] + j, 1);
                    const float var_s = blur(blurred[2] + j, 1) - mean_s * mean_s;
                    const float var_d = blur(blurred[3] + j, 1) - mean_d * mean_d;
                    const float delta = mean_d + (centre_x - centre_y);
                    const float mu_x = (mean_s + mean_d) / 2 + centre_x, mu_y = (mean_s - mean_d) / 2 + centre_y;
                    const float by_means = delta / (mu_x * mu_x + mu_y * mu_y + C1);
                    const float by_spread = 1 / ((var_s + var_d) / 2 + C2);
                    const float l = 1 - delta * by_means, c = 1 - var_d * by_spread;
                    lost[j] = delta * by_means + l * var_d * by_spread;
                    if constexpr (gradients) {
                        const float by_s = l * var_d * by_spread * by_spread, by_d = l * (1 + c) * by_spread;
                        q[0][j] = 2 * by_means * (1 + mu_y * by_means) * c - (mean_s + shift_s) * by_s
                                - (mean_d + shift_d) * by_d;
                        q[1][j] = by_s, q[2][j] = by_d;
                    }
                }
                const int64_t at = (top + i + BORDER) * scratch.pitch + left + BORDER;
                for (int m = 0; gradients && m < 3; ++m) std::memcpy(scratch.maps[m] + at, q[m], columns * sizeof(float));
                float row_total = 0;
#pragma omp simd reduction(+ : row_total)
                for (int j = 0; j < columns; ++j) row_total += lost[j];
                total += row_total;
            }
        }
    return total;
}

// w_ssim ∂(Σ SSIM)/∂y + w_l2 (y − x). With G' the adjoint blur, and because ∂s/∂y = 1 and ∂d/∂y = −1,
//     ∂(Σ SSIM)/∂y = G'[q] + s·G'[q_s] + d·G'[q_d]
//     q_s = 2 ∂SSIM/∂var s = l (1 − c)/(V + C2),   q_d = −2 ∂SSIM/∂var d = l (1 + c)/(V + C2)
//     q   = ∂SSIM/∂μ_y − μ_s q_s − μ_d q_d,        ∂l/∂μ_y = 2 (δ + μ_y (1 − l))/(μ_x² + μ_y² + C1)
void gradient(const Plane& p, const Scratch& scratch, float w_ssim, float w_l2, float* out, int64_t stride) {
    alignas(64) Row blurred[3], q[3], row;
    for (int64_t left = 0; left < p.width; left += TILE_COLUMNS) {
        const int columns = int(std::min<int64_t>(TILE_COLUMNS, p.width - left));
        for (int64_t i = 0; i < p.height; ++i) {
            for (int m = 0; m < 3; ++m) {
                const float* map = scratch.maps[m] + i * scratch.pitch + left;
#pragma omp simd
                for (int j = 0; j < PITCH; ++j) blurred[m][j] = blur(map + j, scratch.pitch);
#pragma omp simd
                for (int j = 0; j < TILE_COLUMNS; ++j) q[m][j] = blur(blurred[m] + j, 1);
            }
            const float *x = p.x + i * p.width + left, *y = p.y + i * p.width + left;
#pragma omp simd
            for (int j = 0; j < columns; ++j) {
                const float a = x[j] - p.centre_x, b = y[j] - p.centre_y;
                row[j] = w_ssim * fma(a + b, q[1][j], fma(a - b, q[2][j], q[0][j])) + w_l2 * (y[j] - x[j]);
            }
            float* to = out + (i * p.width + left) * stride;
            if (stride == 1)
                std::memcpy(to, row, columns * sizeof(float));
            else
                for (int j = 0; j < columns; ++j) to[j * stride] = row[j];
        }
    }
}

// ---- Segmentation: focal (Eq 3.7) and sparsity KL (Eq 3.6) ---------------------------------------------------------------

// e^−x for x >= 0 (NaN passes), to 1 ulp; below e^−87 it stays there.
inline float exp_minus(float x) {
    x = x > 87.0f ? 87.0f : x;
    const float magic = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer in the low bits
    const float shifted = fma(x, -1.44269504f, magic), n = shifted - magic;
    const float r = fma(n, 1.42860677e-6f, fma(n, -0.693145752f, -x));  // ln 2 in two parts
    float p = fma(r, 1.98756915e-4f, 1.39819995e-3f);
    p = fma(p, r, 8.33345191e-3f), p = fma(p, r, 4.16657962e-2f), p = fma(p, r, 1.66666657e-1f), p = fma(p, r, 0.5f);
    p = fma(p * r, r, r) + 1;
    int32_t exponent;
    std::memcpy(&exponent, &shifted, 4);
    const int32_t bits = (exponent + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// log(1 + e) for e in [0, 1], to a few ulp however small e is: 2 artanh(e/(2 + e)).
inline float log1p_unit(float e) {
    const float s = e / (2 + e), t = s * s;
    float p = fma(t, 1.0f / 15, 1.0f / 13);
    p = fma(p, t, 1.0f / 11), p = fma(p, t, 1.0f / 9), p = fma(p, t, 1.0f / 7), p = fma(p, t, 1.0f / 5);
    p = fma(p, t, 1.0f / 3);
    return fma(2 * s * t, p, 2 * s);
}

inline float sigmoid(float z) {
    const float e = exp_minus(std::fabs(z)), r = 1 / (1 + e);
    return z < 0 ? e * r : r;
}

// σ(z) σ(−z), the derivative of σ; beyond ±87 it stays where it is there, below 2e−38.
inline float sigmoid_slope(float z) {
    const float e = exp_minus(std::fabs(z)), r = 1 / (1 + e);
    return e * r * r;
}

// Chunks of one image's pixels: sums within a chunk are vectorised in fp32, chunks are added in fp64.
constexpr int64_t CHUNK = 1024;

// What Eq 3.6 is made of, by its reading. area: Σ σ(z) and Σ σ(−z), see Area; pixel, reverse: Σ log σ(z) and Σ log σ(−z);
// pixel, as printed: −Σ H(σ(z)), H the entropy, and Σ σ(z).
enum class Kl { area, pixel, reverse_pixel };

struct ImageSums {
    double focal = 0, p = 0, q = 0;  // p, q: the two sums of the reading
};

// The mean of σ(z), and of σ(−z), over an image. Where even the largest logit is below −60, σ(z) = e^a σ(z − a) to fp32's
// last bit, and with a = max z + 60 the sum does not underflow.
struct Area {
    float a_p = 0, a_q = 0;
    Area(const float* z, int64_t pixels) {
        float low = z[0], high = z[0];
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int64_t i = 0; i < pixels; ++i) low = z[i] < low ? z[i] : low, high = z[i] > high ? z[i] : high;
        a_p = std::min(high + 60, 0.0f), a_q = std::max(low - 60, 0.0f);
    }
    float p(float z) const { return sigmoid(z - a_p); }
    float q(float z) const { return sigmoid(a_q - z); }
};

// Sums over one image, and w_focal times the gradient of the focal sum into ``dz`` unless it is null.
template <bool squared, Kl kl>
ImageSums segmentation(const float* z, const float* mask, int64_t pixels, float gamma, const Area& area, float w_focal,
                       float* dz) {
    ImageSums sums;
    float d_focal[CHUNK];
    for (int64_t start = 0; start < pixels; start += CHUNK) {
        const int64_t length = std::min(CHUNK, pixels - start);
        float focal = 0, p = 0, q = 0;
#pragma omp simd reduction(+ : focal, p, q)
        for (int64_t i = 0; i < length; ++i) {
            const float logit = z[start + i], m = mask[start + i];
            const float tail = log1p_unit(exp_minus(std::fabs(logit)));
            const float cross_entropy = std::max(logit, 0.0f) - logit * m + tail;
            // 1 − p_t = σ(−logit of the true class), clamped as in the reference.
            const float wrong = logit * (1 - 2 * m), miss = sigmoid(wrong), clamped = miss < 1e-12f ? 1e-12f : miss;
            float power = clamped * clamped;
            if constexpr (!squared) {
                const float minus_log = log1p_unit(exp_minus(std::fabs(wrong))) - std::min(wrong, 0.0f);
                power = exp_minus(gamma * std::min(minus_log, 27.6310211f));  // −log 1e−12
            }
            const float slope = miss < 1e-12f ? 0 : gamma * (1 - 2 * m) * (1 - miss);
            d_focal[i] = w_focal * power * (slope * cross_entropy + sigmoid(logit) - m);
            focal += power * cross_entropy;
            if constexpr (kl == Kl::area) p += area.p(logit), q += area.q(logit);
            if constexpr (kl == Kl::reverse_pixel) p += std::min(logit, 0.0f) - tail, q -= std::max(logit, 0.0f) + tail;
            // H(σ(z)) = |z| σ(−|z|) + log(1 + e^−|z|): nothing cancels.
            if constexpr (kl == Kl::pixel) {
                const float size = std::fabs(logit);
                p -= size * (size > 87 ? 0 : sigmoid(-size)) + tail, q += sigmoid(logit);
            }
        }
        if (dz) std::memcpy(dz + start, d_focal, length * sizeof(float));
        sums.focal += focal, sums.p += p, sums.q += q;
    }
    return sums;
}

template <bool squared>
ImageSums segment(const float* z, const float* mask, int64_t pixels, const Settings& s, const Area& area, float w_focal,
                       float* dz) {
    const auto pass = !s.pixel_kl  ? segmentation<squared, Kl::area>
                    : s.reverse_kl ? segmentation<squared, Kl::reverse_pixel>
                                   : segmentation<squared, Kl::pixel>;
    return pass(z, mask, pixels, float(s.gamma), area, w_focal, dz);
}

// Eq 3.6 of one image: M·log(M/ρ) + (1 − M)·log((1 − M)/(1 − ρ)), or its reverse, ρ·log(ρ/M) + (1 − ρ)·log((1 − ρ)/(1 − M));
// and w_kl · ∂KL/∂z added to ``dz`` unless it is null.
double sparsity_kl(const float* z, int64_t pixels, const Settings& s, const Area& area, const ImageSums& sums, float w_kl,
                   float* dz) {
    const double p = sums.p / pixels, q = sums.q / pixels, log_rho = std::log(s.rho), log_rest = std::log(1 - s.rho);
    const float rho = float(s.rho), logit_rho = float(log_rho - log_rest), scale = w_kl / float(pixels);
    const double log_p = s.pixel_kl ? p : area.a_p + std::log(p), log_q = s.pixel_kl ? q : -area.a_q + std::log(q);
    if (s.reverse_kl) {
        if (dz && s.pixel_kl) {
#pragma omp simd
            for (int64_t i = 0; i < pixels; ++i) dz[i] += scale * (sigmoid(z[i]) - rho);  // −ρ σ(−z) + (1 − ρ) σ(z)
        } else if (dz) {
            const float by_p = scale * rho / float(p), by_q = scale * (1 - rho) / float(q);
#pragma omp simd
            for (int64_t i = 0; i < pixels; ++i) {
                const float here = area.p(z[i]), rest = area.q(z[i]);
                dz[i] += by_q * rest * (1 - rest) - by_p * here * (1 - here);
            }
        }
        return s.rho * (log_rho - log_p) + (1 - s.rho) * (log_rest - log_q);
    }
    if (s.pixel_kl) {
        if (dz) {
#pragma omp simd
            for (int64_t i = 0; i < pixels; ++i)
                dz[i] += scale * (std::fabs(z[i]) > 87 ? 0 : sigmoid_slope(z[i])) * (z[i] - logit_rho);
        }
        const double minus_entropy = p, mean = q;
        return minus_entropy - mean * log_rho - (1 - mean) * log_rest;
    }
    if (dz) {
        const float by_mean = scale * (float(log_p - log_q) - logit_rho);
#pragma omp simd
        for (int64_t i = 0; i < pixels; ++i) dz[i] += by_mean * sigmoid_slope(z[i]);
    }
    return std::exp(log_p) * (log_p - log_rho) + std::exp(log_q) * (log_q - log_rest);
}

}  // namespace

extern "C" int64_t wads_scratch_floats(int64_t height, int64_t width) { return Scratch::floats(height, width); }

// x, y (= X̂) [N, C, H, W] by their strides, logits and mask [N, 1, H, W] dense. Writes the batch's terms ``per_image`` [4, N]
// (1 − SSIM, MSE, focal, KL) and, unless they are null, ``dy`` (strides of y) and ``dz`` (dense): gradients of the weighted
// total of batch means. ``partial`` [2, N·C] and ``scratch`` [threads, wads_scratch_floats] are work space.
extern "C" void wads_objective(const float* x, const float* y, const float* logits, const float* mask, const Settings* settings,
                               float* per_image, float* dy, float* dz, double* partial, float* scratch, int threads) {
    const Settings& s = *settings;
    const int64_t planes = s.images * s.channels, pixels = s.height * s.width;
    const int64_t windows = (s.height - BORDER) * (s.width - BORDER);
    const float w_ssim = float(-s.reconstruction * s.ssim / double(planes * windows));
    const float w_l2 = float(2 * s.reconstruction * s.l2 / double(planes * pixels));
    const float w_focal = float(s.focal / double(s.images * pixels)), w_kl = float(s.kl / double(s.images));
    float *focal = per_image + 2 * s.images, *kl = per_image + 3 * s.images;

#pragma omp parallel num_threads(threads)
    {
        Scratch own(scratch + omp_get_thread_num() * Scratch::floats(s.height, s.width), s.height, s.width);
#pragma omp for schedule(static) nowait
        for (int64_t plane = 0; plane < planes; ++plane) {
            const int64_t image = plane / s.channels * s.channels * pixels, channel = plane % s.channels;
            const float* own_x = contiguous(x + image + channel * s.x_plane, s.x_pixel, pixels, own.x);
            const float* own_y = contiguous(y + image + channel * s.y_plane, s.y_pixel, pixels, own.y);
            const Plane p = measure(own_x, own_y, s.height, s.width);
            partial[plane] = dy ? dissimilarity<true>(p, own) : dissimilarity<false>(p, own);
            partial[planes + plane] = p.square_error;
            if (dy) gradient(p, own, w_ssim, w_l2, dy + image + channel * s.y_plane, s.y_pixel);
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.images; ++n) {
            const float* z = logits + n * pixels;
            float* out = dz ? dz + n * pixels : nullptr;
            const Area area(z, pixels);
            const auto pass = s.gamma == 2 ? segment<true> : segment<false>;
            const ImageSums sums = pass(z, mask + n * pixels, pixels, s, area, w_focal, out);
            focal[n] = float(sums.focal / pixels);
            kl[n] = float(sparsity_kl(z, pixels, s, area, sums, w_kl, out));
        }
    }
    for (int64_t n = 0; n < s.images; ++n) {
        double terms[2] = {0, 0};
        for (int term = 0; term < 2; ++term)
            for (int64_t c = 0; c < s.channels; ++c) terms[term] += partial[term * planes + n * s.channels + c];
        per_image[n] = float(terms[0] / double(s.channels * windows));
        per_image[s.images + n] = float(terms[1] / double(s.channels * pixels));
    }
}
