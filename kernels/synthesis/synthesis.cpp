// Anomaly synthesis on a CPU (Eq 3.1). kernels/synthesis.py is the specification: the names and the order of the float
// operations are its own. Compiled without contraction, so that a mask differs from the reference's only where a sine or
// cosine that differs by an ulp moves the noise across the threshold.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sample_row() takes a pair of pixels from one 16-bit load");

constexpr int LATTICE_ORIGIN = 64, LATTICE_STRIDE = 256;
enum Purpose : uint32_t { ORDER = 1, GEOMETRY = 2, MASK = 3, LATTICE = 4, TEXTURE = 5 };

struct Words {
    uint32_t w[4];
};

// Philox4x32-10: counter (sample low, sample high, index, seed high), key (seed low, purpose).
Words philox(uint64_t seed, Purpose purpose, uint64_t sample, uint32_t index) {
    uint32_t c0 = uint32_t(sample), c1 = uint32_t(sample >> 32), c2 = index, c3 = uint32_t(seed >> 32);
    uint32_t k0 = uint32_t(seed), k1 = purpose;
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

float uniform(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

// Bounds are subtracted in double and rounded once, as Python's are before they meet a float32 tensor.
float between(uint32_t word, double low, double high) { return float(low) + float(high - low) * uniform(word); }

int64_t below(uint32_t word, int64_t count) { return int64_t((uint64_t(word) * uint64_t(count)) >> 32); }

// The swap-or-not shuffle of kernels/philox.py.
int64_t shuffled(uint64_t seed, int64_t position, int64_t length) {
    int64_t x = position % length, cycle = position / length;
    if (x < 0) x += length, cycle -= 1;
    for (uint32_t round = 0; round < 40; ++round) {
        const Words words = philox(seed, ORDER, uint64_t(cycle), round);
        int64_t partner = (int64_t(words.w[0]) % length - x) % length;
        if (partner < 0) partner += length;
        uint32_t bits = uint32_t(std::max(x, partner)) ^ words.w[1];
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6Bu;
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35u;
        if ((bits >> 16) & 1) x = partner;
    }
    return x;
}

struct Settings {  // mirrors kernels/native.py; every field has 8 bytes
    int64_t image_size, lattice_max;
    double scale_low, scale_high, rotation, clean_fraction, blend_max, threshold, texture_jitter;
    int64_t grey;
};

struct Map {  // [[xx, xy, x], [yx, yy, y]]: output coordinates to source coordinates, both in [-1, 1]
    float xx, xy, x, yx, yy, y;
};

Map similarity(float scale, float angle, float shift_x, float shift_y) {
    const float cos = scale * cosf(angle), sin = scale * sinf(angle);
    return {cos, -sin, shift_x, sin, cos, shift_y};
}

struct Draws {
    Map image_map, texture_map;
    int64_t texture, lattice[2];
    float gain[3], bias[3], angle, beta;
    bool anomalous;
};

Draws draw(uint64_t seed, uint64_t sample, int64_t textures, const Settings& s) {
    Draws d;
    const Words geometry = philox(seed, GEOMETRY, sample, 0);
    const float scale = between(geometry.w[0], s.scale_low, s.scale_high);
    const float turn = between(geometry.w[1], -1, 1) * float(s.rotation * (M_PI / 180));
    d.image_map = similarity(scale, turn, (1 - scale) * between(geometry.w[2], -1, 1),
                             (1 - scale) * between(geometry.w[3], -1, 1));

    const Words mask = philox(seed, MASK, sample, 0);
    d.anomalous = uniform(mask.w[0]) >= float(s.clean_fraction);
    for (int axis = 0; axis < 2; ++axis) d.lattice[axis] = below(mask.w[1 + axis], s.lattice_max + 1);
    d.angle = between(mask.w[3], -0.5, 0.5) * float(M_PI);
    d.beta = float(s.blend_max) * uniform(philox(seed, MASK, sample, 1).w[0]);

    const double jitter = s.texture_jitter;
    const Words place = philox(seed, TEXTURE, sample, 0), look = philox(seed, TEXTURE, sample, 1);
    const Words tint = philox(seed, TEXTURE, sample, 2), offset = philox(seed, TEXTURE, sample, 3);
    d.texture = below(place.w[0], textures);
    d.texture_map = similarity(between(place.w[2], 1 - jitter, 1), between(place.w[1], -M_PI, M_PI),
                               between(place.w[3], -jitter, jitter), between(look.w[0], -jitter, jitter));
    const float sign = uniform(look.w[2]) < float(0.5 * jitter) ? -1.0f : 1.0f;
    const float contrast = sign * between(look.w[1], 1 - jitter, 1 + jitter);
    for (int c = 0; c < 3; ++c) {
        const int of = s.grey ? 0 : c;
        d.gain[c] = contrast * between(tint.w[of], 1 - jitter / 2, 1 + jitter / 2);
        d.bias[c] = 0.5f - 0.5f * d.gain[c] + between(offset.w[of], -jitter / 2, jitter / 2);
    }
    return d;
}

// Buffers of one thread, a row of pixels each.
struct Rows {
    std::vector<float> axis, chosen_axis, noise, f, g, colour[3], upper, lower;
    std::vector<int32_t> offset, chosen;
    std::vector<uint32_t> block[3];
    std::vector<float> lattice;  // (x, y) of the gradients of the points that the window touches

    explicit Rows(int64_t n)
        : axis(n), chosen_axis(n), noise(n), f(n), g(n), upper(4 * n), lower(4 * n), offset(n), chosen(n) {
        for (auto& row : colour) row.resize(n);
        for (auto& row : block) row.resize(n);
        for (int64_t i = 0; i < n; ++i) axis[i] = float(2 * i + 1) / float(n) - 1;
    }
};

// A uint8 image [3, height, width].
struct Image {
    const uint8_t* pixels;
    int64_t height, width;
};

// Half-pixel centres, reflected at the border.
inline float source(float coordinate, float side) {
    float t = std::fabs((coordinate + 1) * (side / 2));
    t -= 2 * side * std::floor(t / (2 * side));
    t = std::min(t, 2 * side - t) - 0.5f;
    return std::min(std::max(t, 0.0f), side - 1);
}

// Bilinear samples in [0, 1] at the n output positions (x[i], y), into rows.colour.
void sample_row(Image image, const Map& map, const float* x, float y, int64_t n, Rows& rows) {
    const float height = float(image.height), width = float(image.width);
    const int32_t last_row = int32_t(image.height) - 2, last_column = int32_t(image.width) - 2;
    float *wx = rows.f.data(), *wy = rows.g.data();
    int32_t* offset = rows.offset.data();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float u = source(map.xx * x[i] + map.xy * y + map.x, width);
        const float v = source(map.yx * x[i] + map.yy * y + map.y, height);
        const int32_t column = std::min(int32_t(u), last_column), row = std::min(int32_t(v), last_row);
        wx[i] = u - float(column), wy[i] = v - float(row);
        offset[i] = row * int32_t(image.width) + column;
    }
    // Fetches apart from arithmetic, so that the latter is vectorised. A block is 2×2 pixels of one channel in 32 bits.
    const int64_t plane = image.height * image.width;
    uint32_t* block[] = {rows.block[0].data(), rows.block[1].data(), rows.block[2].data()};
    for (int64_t i = 0; i < n; ++i)
        for (int c = 0; c < 3; ++c) {
            uint16_t upper, lower;
            std::memcpy(&upper, image.pixels + c * plane + offset[i], 2);
            std::memcpy(&lower, image.pixels + c * plane + offset[i] + image.width, 2);
            block[c][i] = upper | uint32_t(lower) << 16;
        }
    for (int c = 0; c < 3; ++c) {
        float* colour = rows.colour[c].data();
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const int32_t pixels = int32_t(block[c][i]);
            const float nw = float(pixels & 255), ne = float((pixels >> 8) & 255);
            const float sw = float((pixels >> 16) & 255), se = float((pixels >> 24) & 255);
            const float north = nw + wx[i] * (ne - nw), south = sw + wx[i] * (se - sw);
            colour[i] = (north + wy[i] * (south - north)) * (1.0f / 255);
        }
    }
}

// The rotated window of Perlin noise of one sample.
class Noise {
  public:
    Noise(uint64_t seed, uint64_t sample, const Draws& d, int64_t size, Rows& rows) : rows(rows), size(size) {
        cos = cosf(d.angle), sin = sinf(d.angle);
        for (int axis = 0; axis < 2; ++axis) step[axis] = float(1 << d.lattice[axis]) / float(size);
        // u and v are monotone in x and in y, so their extremes are at the window's corners.
        const float a = -float(size) / 2, b = a + float(size - 1);
        const auto [u0, u1] = std::minmax({u(a, a), u(a, b), u(b, a), u(b, b)});
        const auto [v0, v1] = std::minmax({v(a, a), v(a, b), v(b, a), v(b, b)});
        // One Philox call serves four neighbours along x, counted from a multiple of 4.
        const int x0 = (int(std::floor(u0)) + LATTICE_ORIGIN) / 4 * 4, x1 = int(std::floor(u1)) + LATTICE_ORIGIN + 1;
        const int y0 = int(std::floor(v0)) + LATTICE_ORIGIN, y1 = int(std::floor(v1)) + LATTICE_ORIGIN + 1;
        origin_x = x0 - LATTICE_ORIGIN, origin_y = y0 - LATTICE_ORIGIN, points = (x1 / 4 + 1) * 4 - x0;
        rows.lattice.resize(2 * points * (y1 - y0 + 1));
        float* gradient = rows.lattice.data();
        for (int y = y0; y <= y1; ++y)
            for (int x = x0; x <= x1; x += 4)
                for (uint32_t word : philox(seed, LATTICE, sample, y * (LATTICE_STRIDE / 4) + x / 4).w) {
                    const float angle = uniform(word) * float(2 * M_PI);
                    *gradient++ = cosf(angle), *gradient++ = sinf(angle);
                }
    }

    // Row y of the noise, scaled by √2, into rows.noise.
    void row(int64_t y) {
        float *f = rows.f.data(), *g = rows.g.data(), *noise = rows.noise.data();
        float *upper = rows.upper.data(), *lower = rows.lower.data();
        int32_t* corner = rows.offset.data();
        const float py = float(y) - float(size) / 2;
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) {
            const float px = float(int32_t(x)) - float(size) / 2, pu = u(px, py), pv = v(px, py);
            const float i = std::floor(pu), j = std::floor(pv);
            f[x] = pu - i, g[x] = pv - j;
            corner[x] = 2 * ((int32_t(j) - origin_y) * points + int32_t(i) - origin_x);
        }
        for (int64_t x = 0; x < size; ++x) {  // two neighbouring gradients are four floats
            const float* point = rows.lattice.data() + corner[x];
            std::memcpy(upper + 4 * x, point, 4 * sizeof(float));
            std::memcpy(lower + 4 * x, point + 2 * points, 4 * sizeof(float));
        }
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) {
            const float *a = upper + 4 * x, *b = lower + 4 * x;
            const float n00 = a[0] * f[x] + a[1] * g[x], n10 = a[2] * (f[x] - 1) + a[3] * g[x];
            const float n01 = b[0] * f[x] + b[1] * (g[x] - 1), n11 = b[2] * (f[x] - 1) + b[3] * (g[x] - 1);
            const float top = n00 + fade(f[x]) * (n10 - n00), bottom = n01 + fade(f[x]) * (n11 - n01);
            noise[x] = float(M_SQRT2) * (top + fade(g[x]) * (bottom - top));
        }
    }

  private:
    static float fade(float t) { return t * t * t * ((6 * t - 15) * t + 10); }  // Perlin's 6t⁵ − 15t⁴ + 10t³
    float u(float x, float y) const { return (cos * x - sin * y + float(size) / 2) * step[0]; }
    float v(float x, float y) const { return (sin * x + cos * y + float(size) / 2) * step[1]; }

    Rows& rows;
    int64_t size;
    float cos, sin, step[2];
    int origin_x, origin_y, points;
};

// One sample: clean and anomalous [size, size, 3] (channels last), mask [size, size] of zeros and ones.
void synthesise(uint64_t seed, uint64_t sample, const Draws& d, Image image, Image texture, const Settings& s, Rows& rows,
                float* clean, float* anomalous, uint8_t* mask) {
    const int64_t size = s.image_size;
    const float threshold = float(s.threshold);
    const int64_t plane = image.height * image.width, lead = plane / 4;
    auto prefetch = [&](int64_t from, int64_t to) {
        for (int c = 0; c < 3; ++c)
            for (int64_t i = from; i < std::min(to, plane); i += 64) __builtin_prefetch(image.pixels + c * plane + i);
    };
    prefetch(0, lead);
    std::optional<Noise> noise;
    if (d.anomalous) noise.emplace(seed, sample, d, size, rows);
    for (int64_t y = 0; y < size; ++y, clean += 3 * size, anomalous += 3 * size, mask += size) {
        prefetch(lead + plane * y / size, lead + plane * (y + 1) / size);
        sample_row(image, d.image_map, rows.axis.data(), rows.axis[y], size, rows);
        const float *red = rows.colour[0].data(), *green = rows.colour[1].data(), *blue = rows.colour[2].data();
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) clean[3 * x] = red[x], clean[3 * x + 1] = green[x], clean[3 * x + 2] = blue[x];
        std::memcpy(anomalous, clean, 3 * size * sizeof(float));
        if (!d.anomalous) {
            std::memset(mask, 0, size);
            continue;
        }

        noise->row(y);
        const float* value = rows.noise.data();
        int32_t masked = 0;
#pragma omp simd reduction(+ : masked)
        for (int64_t x = 0; x < size; ++x) mask[x] = value[x] > threshold, masked += value[x] > threshold;
        if (!masked) continue;  // the texture is sampled only where it shows
        for (int64_t x = 0, i = 0; i < masked; ++x) {
            rows.chosen[i] = int32_t(x), rows.chosen_axis[i] = rows.axis[x];
            i += value[x] > threshold;
        }
        sample_row(texture, d.texture_map, rows.chosen_axis.data(), rows.axis[y], masked, rows);
        for (int64_t i = 0; i < masked; ++i)
            for (int c = 0; c < 3; ++c) {
                float &pixel = anomalous[3 * rows.chosen[i] + c], t = rows.colour[c][i] * d.gain[c] + d.bias[c];
                pixel += (1 - d.beta) * (std::min(std::max(t, 0.0f), 1.0f) - pixel);
            }
    }
}

}  // namespace

// Samples [batch] of images [*, 3, image_height, image_width] and textures [textures, 3, texture_height, texture_width].
// ``rows`` [batch] are rows of ``images``, or null for those that the shuffle of ``count`` images shows.
extern "C" void wads_synthesise(const uint8_t* images, int64_t image_height, int64_t image_width, const uint8_t* textures,
                                int64_t texture_count, int64_t texture_height, int64_t texture_width, const int64_t* sample,
                                const int64_t* rows, int64_t batch, int64_t count, uint64_t seed, const Settings* settings,
                                float* clean, float* anomalous, uint8_t* mask, int threads) {
    const int64_t pixels = settings->image_size * settings->image_size;
#pragma omp parallel num_threads(threads)
    {
        Rows buffers(settings->image_size);
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < batch; ++b) {
            const Draws d = draw(seed, uint64_t(sample[b]), texture_count, *settings);
            const int64_t row = rows ? rows[b] : shuffled(seed, sample[b], count);
            const Image image{images + row * 3 * image_height * image_width, image_height, image_width};
            const Image texture{textures + d.texture * 3 * texture_height * texture_width, texture_height, texture_width};
            synthesise(seed, uint64_t(sample[b]), d, image, texture, *settings, buffers, clean + 3 * b * pixels,
                       anomalous + 3 * b * pixels, mask + b * pixels);
        }
    }
}
